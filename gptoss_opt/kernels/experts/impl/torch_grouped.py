"""torch's grouped matrix product on dense weights, on CPU and CUDA."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ...tracing import is_traced
from ..fused_cuda import fused, serves
from ..grouped import why_grouped_waits
from ..routes import add_bias
from ..weights import DenseWeights, ExpertsRequest, ExpertWeights, Fused

ROW_BYTES = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TorchGrouped:
    """`torch.nn.functional.grouped_mm`, which autograd differentiates. It has no activation of its own."""

    name = "torch"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        device_type, dtype = request.device_type, request.dtype
        if device_type not in ("cpu", "cuda", "meta"):
            return f"grouped_mm has no kernel on {device_type}"
        if dtype not in DTYPES:
            return f"grouped_mm takes {', '.join(map(str, DTYPES))}, and the model is in {dtype}"
        if device_type == "cuda" and dtype == torch.float16:
            return "grouped_mm has no kernel for torch.float16 on cuda"
        if odd := [size for size in request.sizes if size * dtype.itemsize % ROW_BYTES]:
            return f"grouped_mm takes rows of a multiple of {ROW_BYTES} bytes, not of {odd[0]} values in {dtype}"
        return None

    def fused_for(self, x: Tensor, indices: Tensor, weights: ExpertWeights) -> Fused | None:
        """All in a few launches on a GPU; None elsewhere, and under autocast, which may change the product."""
        if not x.is_cuda or not indices.numel() or not serves(x.device.type, x.dtype) or torch.is_autocast_enabled():
            return None
        return partial(fused, _product_of_known)

    def as_operator(self, x: Tensor, weights: DenseWeights) -> bool:
        # torch traces its own product, and has it without memory, in bfloat16 only.
        return x.dtype != torch.bfloat16 and is_traced(x)

    def why_waits(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return why_grouped_waits(dtype, device)

    def forward(self, x: Tensor, offsets: Tensor, weights: DenseWeights) -> Tensor:
        y = _product(x, offsets, weights.weight)
        return y if weights.bias is None else add_bias(y, offsets, weights.bias)

    def backward(self, d_y: Tensor, offsets: Tensor, weights: DenseWeights) -> Tensor:
        return _product(d_y.contiguous(), offsets, weights.weight.mT)


TORCH_GROUPED = TorchGrouped()


def _product_of_known(x: Tensor, offsets: Tensor, weights: DenseWeights) -> Tensor:
    """The product without the bias; what it gives for rows of no expert is as the memory was."""
    return functional.grouped_mm(x, weights.weight, offs=offsets)


def _product(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    # grouped_mm leaves rows after the last offset as the memory was, of y and of the gradient of x.
    if x.device.type == "cpu" and not is_traced(x):
        stop = int(offsets[-1])
        y = functional.grouped_mm(x[:stop], weight, offs=offsets)
        return y if stop == x.shape[0] else functional.pad(y, (0, 0, 0, x.shape[0] - stop))
    outside = (torch.arange(x.shape[0], device=x.device) >= offsets[-1])[:, None]
    return functional.grouped_mm(x.masked_fill(outside, 0), weight, offs=offsets).masked_fill(outside, 0)
