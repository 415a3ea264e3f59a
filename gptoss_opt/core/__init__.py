"""Wrappers, stacks, the journal and their errors. Knows torch.nn, and nothing of Hugging Face."""

from .backend import Backend, Choice, check_name, choose
from .edit import Journal, Relayout
from .errors import BackendError, CompatibilityError, IrreversibleError
from .explain import Explanation, explain
from .layout import STORAGES, Layout, Sliced, Source, Storage, Stored
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
    "Host",
    "IrreversibleError",
    "Journal",
    "Layout",
    "Phase",
    "Relayout",
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
    "resolve",
    "stack_of",
    "undo",
]
