"""Wrappers, stacks, the journal and their errors. Knows torch.nn, and nothing of Hugging Face."""

from .backend import Backend, Choice, check_name, choose
from .errors import BackendError, CompatibilityError, IrreversibleError
from .explain import Explanation, explain
from .journal import Journal
from .record import held_by, layout_of, mesh_of
from .spec import WRAPPERS, Attachment, Host, Phase, Report, Spec
from .stack import Built, Model, Stack, Wrapper, compose, stack_of, undo

__all__ = [
    "WRAPPERS",
    "Attachment",
    "Backend",
    "BackendError",
    "Built",
    "Choice",
    "CompatibilityError",
    "Explanation",
    "Host",
    "IrreversibleError",
    "Journal",
    "Model",
    "Phase",
    "Report",
    "Spec",
    "Stack",
    "Wrapper",
    "check_name",
    "choose",
    "compose",
    "explain",
    "held_by",
    "layout_of",
    "mesh_of",
    "stack_of",
    "undo",
]
