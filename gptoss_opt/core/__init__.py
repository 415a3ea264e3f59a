"""Wrappers, stacks, the journal and their errors. Knows torch.nn, and nothing of Hugging Face."""

from .backend import Backend, Choice, check_name, choose
from .edit import Journal
from .errors import BackendError, CompatibilityError, IrreversibleError
from .explain import Explanation, explain
from .layout import (
    DENSE,
    STORAGES,
    Form,
    Layout,
    Mesh,
    Part,
    Sliced,
    Source,
    Split,
    Storage,
    Stored,
    held_bytes,
    stored_splits,
    take,
)
from .move import Held, exchange
from .record import held_by, layout_of
from .stack import Stack, compose, resolve, stack_of, undo
from .wrapper import WRAPPERS, Host, Phase, Report, Wrapper

__all__ = [
    "DENSE",
    "STORAGES",
    "WRAPPERS",
    "Backend",
    "BackendError",
    "Choice",
    "CompatibilityError",
    "Explanation",
    "Form",
    "Held",
    "Host",
    "IrreversibleError",
    "Journal",
    "Layout",
    "Mesh",
    "Part",
    "Phase",
    "Report",
    "Sliced",
    "Source",
    "Split",
    "Stack",
    "Storage",
    "Stored",
    "Wrapper",
    "check_name",
    "choose",
    "compose",
    "exchange",
    "explain",
    "held_by",
    "held_bytes",
    "layout_of",
    "resolve",
    "stack_of",
    "stored_splits",
    "take",
    "undo",
]
