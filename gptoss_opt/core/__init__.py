"""Wrappers, stacks, the journal and their errors. Knows torch.nn, and nothing of Hugging Face."""

from .backend import Backend, Choice, check_name, choose
from .errors import BackendError, CompatibilityError, IrreversibleError
from .explain import Explanation, explain
from .journal import Journal
from .record import held_by, layout_of, mesh_of
from .spec import WRAPPERS, Attachment, Filler, Host, Phase, Report, Spec
from .stack import Stack, Wrapper, compose, stack_of, takes_model, undo
