"""torch's grouped matrix product on dense weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .routes import add_bias
from .weights import Dense

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why it cannot serve, or None."""
    if device_type not in ("cpu", "cuda", "meta"):
        return f"grouped_mm has no kernel on {device_type}"
    if dtype not in DTYPES:
        return f"grouped_mm takes {', '.join(map(str, DTYPES))}, and the model is in {dtype}"
    if device_type == "cuda" and dtype == torch.float16:
        return "grouped_mm has no kernel for torch.float16 on cuda"
    return None


def linear(x: Tensor, ends: Tensor, weights: Dense) -> Tensor:
    """`x` [N, in] times the dense weights of each row's expert, plus its bias: [N, out]; differentiable."""
    y = _product(x, ends, weights.weight)
    return y if weights.bias is None else add_bias(y, ends, weights.bias)


def _product(x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    # grouped_mm leaves rows after the last end as the memory was, of y and of the gradient of x.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        stop = int(ends[-1])
        y = functional.grouped_mm(x[:stop], weight, offs=ends)
        return y if stop == x.shape[0] else functional.pad(y, (0, 0, 0, x.shape[0] - stop))
    outside = (torch.arange(x.shape[0], device=x.device) >= ends[-1])[:, None]
    return functional.grouped_mm(x.masked_fill(outside, 0), weight, offs=ends).masked_fill(outside, 0)
