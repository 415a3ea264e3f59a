"""Linear layers of few rows on CPUs, by the native library.

A product of few rows takes the time in which its weights are read, and the native one comes nearer to what the memory
gives than torch's. From some number of rows on, torch's is as fast: see `kernel_table.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .direct import is_direct
from .gate import admit
from .kernel_table import LINEARS, is_ever_native, kernel_for
from .native import DTYPES, LinearArguments, library, why_not
from .processor import processor


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
        if not any(is_ever_native(name, request.dtype) for name in LINEARS):
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


def is_faster(projection: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `product` can compute with these, and was measured to be faster than torch's for this projection."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not is_direct(*tensors) or weight.dim() != 2 or not x.dim():
        return False
    num_out, length = weight.shape
    if not length or x.shape[-1] != length or (bias is not None and bias.shape != (num_out,)):
        return False  # torch says what does not go together
    rows = x.numel() // length
    return x.dtype in DTYPES and rows > 0 and kernel_for(projection, x.dtype, rows) == "native"


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
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, and the native product takes {' and '.join(map(str, DTYPES))}.")
    length, num_out = x.shape[-1], len(weight)
    admit("x", x, x.dtype, x.shape)
    weight = admit("weight", weight, x.dtype, (num_out, length))
    bias = None if bias is None else admit("bias", bias, x.dtype, (num_out,))
    return product(x, weight, bias, instruction_set=instruction_set)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, instruction_set: int | None = None) -> Tensor:
    """`linear` of what `is_faster` or `linear` has looked at."""
    functions, best, parallel = library()
    num_out, length = weight.shape
    rows, out = x.contiguous(), x.new_empty(*x.shape[:-1], num_out)
    arguments = LinearArguments(
        rows.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.numel() // max(length, 1),
        num_out,
        length,
        x.dtype == torch.bfloat16,
    )
    which = best if instruction_set is None else instruction_set
    functions.gptoss_linear(which, arguments, parallel, torch.get_num_threads())
    return out
