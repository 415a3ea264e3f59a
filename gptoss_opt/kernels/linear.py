"""Linear layers of few rows on CPUs, by the native library.

A product of few rows takes the time in which its weights are read, and the native one comes nearer to what the memory
gives than torch's. From some number of rows on, torch's is as fast: see `MAX_ROWS`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .gate import admit
from .native import LinearArguments, library, why_not
from .processor import processor
from .tracing import is_traced
from .transforms import active

MAX_ROWS: dict[str, dict[torch.dtype, int]] = {
    "Zen 5": {torch.bfloat16: 16, torch.float32: 64},
}
"""Up to how many rows the native product is faster than torch's, by processor and dtype; where it was not measured, for
none. By `python -m benchmarks linears`, whose results are in benchmarks/results."""


@dataclass(frozen=True)
class LinearRequest:
    """What a backend must serve: where a model computes, and in which dtype."""

    device_type: str
    dtype: torch.dtype


class Native:
    """The native product where it is faster than torch's; torch's elsewhere, and where gradients are recorded."""

    name = "native"
    only_named = False

    def why_not(self, request: LinearRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        if reason := why_not(request.device_type, request.dtype):
            return reason
        if not max_rows(request.dtype):
            return f"was not measured to be faster than torch in {request.dtype} on {processor()}"
        return None


class Torch:
    """torch's own product: nothing changes."""

    name = "torch"
    only_named = False

    def why_not(self, request: LinearRequest) -> str | None:
        """None: it serves everywhere."""
        return None


BACKENDS = (Native(), Torch())


def max_rows(dtype: torch.dtype) -> int:
    """Up to how many rows the native product is faster than torch's on this processor; 0 if it is not known to be."""
    return MAX_ROWS.get(processor(), {}).get(dtype, 0)


def is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` can compute a product with these, and is not slower than torch's."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if is_traced(*tensors) or active() or torch.is_autocast_enabled("cpu"):
        return False
    num_rows = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    if x.device.type != "cpu" or not 0 < num_rows <= max_rows(x.dtype):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if any(one.layout != torch.strided or one.is_neg() for one in tensors) or weight.shape[-1:] != x.shape[-1:]:
        return False  # torch computes with what is otherwise than it seems, and says what does not go together
    return all(one.dtype == x.dtype and one.device == x.device and one.is_contiguous() for one in tensors[1:])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, instruction_set: int | None = None) -> Tensor:
    """`x` [..., in] times `weight` [out, in] transposed, plus `bias` [out]: [..., out], on a CPU, without gradients.

    Products and sums are in float32; the result is rounded once.

    Args:
        x: bfloat16 or float32.
        weight: in the same dtype.
        bias: in the same dtype; or None.
        instruction_set: an index of `INSTRUCTION_SETS`, by default the best that this CPU has.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.

    Example:
        >>> linear(torch.ones(2, 40), torch.ones(3, 40), torch.ones(3))
        tensor([[41., 41., 41.],
                [41., 41., 41.]])
    """
    functions, best, parallel = library()
    length, num_out = x.shape[-1], len(weight)
    rows = admit("x", x.reshape(-1, length), x.dtype, (x.numel() // max(length, 1), length))
    weight = admit("weight", weight, x.dtype, (num_out, length))
    bias = None if bias is None else admit("bias", bias, x.dtype, (num_out,))
    out = rows.new_empty(len(rows), num_out)
    arguments = LinearArguments(
        rows.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        len(rows),
        num_out,
        length,
        x.dtype == torch.bfloat16,
    )
    which = best if instruction_set is None else instruction_set
    functions.gptoss_linear(which, ctypes.byref(arguments), parallel, torch.get_num_threads())
    return out.view(*x.shape[:-1], num_out)
