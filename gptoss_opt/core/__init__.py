"""Wrappers, stacks, the journal and their errors. Knows torch.nn, and nothing of Hugging Face."""

from .backend import Backend, Choice, check_name, choose
from .edit import Journal
from .errors import BackendError, CompatibilityError, IrreversibleError
from .explain import Explanation, explain
from .layout import STORAGES, Held, Layout, Sliced, Source, Storage, Stored
from .record import held_by
from .stack import Stack, compose, resolve, stack_of, undo
from .wrapper import WRAPPERS, Host, Phase, Report, Wrapper

__all__ = [
    "STORAGES",
    "WRAPPERS",
    "Backend",
    "BackendError",
    "Choice",
    "CompatibilityError",
    "Explanation",
    "Held",
    "Host",
    "IrreversibleError",
    "Journal",
    "Layout",
    "Phase",
    "Report",
    "Sliced",
    "Source",
    "Stack",
    "Storage",
    "Stored",
    "Wrapper",
    "check_name",
    "choose",
    "compose",
    "explain",
    "held_by",
    "resolve",
    "stack_of",
    "undo",
]
