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
from .load import load
from .model.checkpoint import CheckpointError
from .version import __version__
from .wrappers.fast_experts import with_fast_experts
from .wrappers.flash_attention import with_flash_attention
from .wrappers.mxfp4_experts import with_mxfp4_experts

__all__ = [
    "BackendError",
    "CheckpointError",
    "CompatibilityError",
    "IrreversibleError",
    "Stack",
    "Wrapper",
    "__version__",
    "compose",
    "explain",
    "load",
    "stack_of",
    "undo",
    "with_fast_experts",
    "with_flash_attention",
    "with_mxfp4_experts",
]
