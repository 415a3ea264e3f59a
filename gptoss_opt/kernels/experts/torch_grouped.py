"""torch's grouped matrix product on dense weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .routes import add_bias, is_traced
from .weights import Dense

ROW_BYTES = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(device_type: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """The reason why it cannot serve, or None."""
    if device_type not in ("cpu", "cuda", "meta"):
        return f"grouped_mm has no kernel on {device_type}"
    if dtype not in DTYPES:
        return f"grouped_mm takes {', '.join(map(str, DTYPES))}, and the model is in {dtype}"
    if device_type == "cuda" and dtype == torch.float16:
        return "grouped_mm has no kernel for torch.float16 on cuda"
    if odd := [size for size in sizes if size * dtype.itemsize % ROW_BYTES]:
        return f"grouped_mm takes rows of a multiple of {ROW_BYTES} bytes, not of {odd[0]} values in {dtype}"
    return None


def dense_forward(x: Tensor, ends: Tensor, weights: Dense) -> Tensor:
    """`x` [N, in] times the dense weights of each row's expert, plus its bias: [N, out]; differentiable."""
    y = _product(x, ends, weights.weight)
    return y if weights.bias is None else add_bias(y, ends, weights.bias)


def dense_backward(d_y: Tensor, ends: Tensor, weights: Dense) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return _product(d_y.contiguous(), ends, weights.weight.mT)


def _product(x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    # grouped_mm leaves rows after the last end as the memory was, of y and of the gradient of x.
    if x.device.type == "cpu" and not is_traced(x):
        stop = int(ends[-1])
        y = functional.grouped_mm(x[:stop], weight, offs=ends)
        return y if stop == x.shape[0] else functional.pad(y, (0, 0, 0, x.shape[0] - stop))
    outside = (torch.arange(x.shape[0], device=x.device) >= ends[-1])[:, None]
    return functional.grouped_mm(x.masked_fill(outside, 0), weight, offs=ends).masked_fill(outside, 0)
