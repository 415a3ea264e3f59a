"""Where Triton kernels run: asked by all that have some."""

from __future__ import annotations

import importlib.util
from importlib import metadata

import torch
from packaging.version import Version

MIN_TRITON = "3.2"
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why Triton kernels cannot serve, or None.

    Args:
        device_type: of the model, "cuda" for one.
        dtype: of the activations.

    Example:
        >>> why_not("cpu", torch.bfloat16)
        'needs CUDA, and the model is on cpu'
    """
    if device_type != "cuda":
        return f"needs CUDA, and the model is on {device_type}"
    if torch.version.hip:
        return "relies on bfloat16 subnormals, which have not been tried on ROCm"
    if dtype not in DTYPES:
        return f"takes {', '.join(map(str, DTYPES))}, and the model is in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return "needs a GPU of compute capability {}.{} or newer".format(*MIN_CAPABILITY)
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        # Nightly builds of torch bring it along under a name of their own, and newer than the oldest that will do.
        return None
    if Version(version) < Version(MIN_TRITON):
        return f"needs triton {MIN_TRITON} or newer, not {version}"
    return None
