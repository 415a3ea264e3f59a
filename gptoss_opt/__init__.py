"""Composable wrappers that make a Hugging Face GPT-OSS model fast and small, and keep it the same model."""

from .core import (
    BackendError,
    CompatibilityError,
    IrreversibleError,
    Stack,
    Wrapper,
    compose,
    explain,
    stack_of,
    undo,
)
from .version import __version__
from .wrappers.flash_attention import with_flash_attention

__all__ = [
    "BackendError",
    "CompatibilityError",
    "IrreversibleError",
    "Stack",
    "Wrapper",
    "__version__",
    "compose",
    "explain",
    "stack_of",
    "undo",
    "with_flash_attention",
]
