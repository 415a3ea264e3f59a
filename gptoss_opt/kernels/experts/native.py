"""The native library for CPUs: found, loaded and called.

It is plain C (native.c), built when the package is installed if there is a compiler, and loaded on first use. Its
threads are those of torch's own OpenMP runtime, as many as `torch.get_num_threads()`: a second pool would compete with
torch's, whose threads go on spinning for a while after each operation.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..mxfp4 import BLOCK
from .weights import Packed

MODULE = "gptoss_opt.kernels.experts._native"
DTYPES = (torch.bfloat16, torch.float32)
INSTRUCTION_SETS = ("plain C", "AVX2", "AVX-512", "AVX-512 BF16")

_P, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double


class Library(NamedTuple):
    """The loaded library, the best of `INSTRUCTION_SETS` that this CPU has, and the fork-join of torch's threads."""

    functions: ctypes.CDLL
    best: int
    parallel: ctypes.c_void_p | None


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why the native library cannot serve, or None."""
    if device_type != "cpu":
        return f"is for CPUs, and the model is on {device_type}"
    if dtype not in DTYPES:
        return f"takes {' and '.join(map(str, DTYPES))}, and the model is in {dtype}"
    if _path() is None:
        return "was not built when gptoss_opt was installed: install a C compiler, then gptoss_opt again"
    return None


@cache
def _path() -> str | None:
    spec = importlib.util.find_spec(MODULE)
    return None if spec is None else spec.origin


@cache
def library() -> Library:
    """The native library, loaded."""
    path = _path()
    assert path is not None, "ask why_not() first"
    functions = ctypes.CDLL(path)
    functions.gptoss_product.argtypes = [_INT, _INT, *[_P] * 7, *[_LONG] * 3, _P, _INT]
    functions.gptoss_swiglu.argtypes = [_INT, _INT, _P, _P, _P, _LONG, _DOUBLE, _DOUBLE, _P, _INT]
    return Library(functions, functions.gptoss_init(), _fork_join())


def _fork_join() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the OpenMP runtime that torch has loaded; None where it has another, or none."""
    if sys.platform != "linux":
        return None
    maps = Path("/proc/self/maps").read_text()
    found = sorted(set(re.findall(r"/\S*/lib(?:g|i)?omp[^/\s]*\.so[^/\s]*", maps)))
    home = str(Path(torch.__file__).parent)
    for path in sorted(found, key=lambda path: not path.startswith(home)):
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel"):
            return ctypes.cast(runtime.GOMP_parallel, _P)
    return None


def _product(
    x: Tensor, ends: Tensor, weights: Packed, bias: Tensor | None, backward: bool, which: int | None
) -> Tensor:
    functions, best, parallel = library()
    which = best if which is None else which
    # Only the last of the instruction sets multiplies bfloat16; the others take float32.
    half = x.dtype == torch.bfloat16 and which == len(INSTRUCTION_SETS) - 1
    work = torch.bfloat16 if half else torch.float32
    which = which if half else min(which, len(INSTRUCTION_SETS) - 2)
    num_experts, num_out, num_blocks = weights.scales.shape
    num_in = num_blocks * BLOCK
    x = x.to(work).contiguous()
    bias = None if bias is None else bias.to(work).contiguous()
    blocks, scales = weights.blocks.contiguous(), weights.scales.contiguous()
    y = x.new_empty(x.shape[0], num_in if backward else num_out)
    y[int(ends[-1]) :] = 0
    room = torch.empty_like(x) if half and not backward else None
    status = functions.gptoss_product(
        which,
        backward,
        x.data_ptr(),
        y.data_ptr(),
        ends.contiguous().data_ptr(),
        blocks.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if room is None else room.data_ptr(),
        num_experts,
        num_in,
        num_out,
        parallel,
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError("the native kernel found no memory for its scratch space.")
    return y


def forward(x: Tensor, ends: Tensor, weights: Packed, *, instruction_set: int | None = None) -> Tensor:
    """`x` [N, in] times the weights of each row's expert, plus its bias: [N, out]. Rows of no expert give zero."""
    return _product(x, ends, weights, weights.bias, False, instruction_set).to(x.dtype)


def backward(d_y: Tensor, ends: Tensor, weights: Packed, *, instruction_set: int | None = None) -> Tensor:
    """The gradient [N, in] for `x` of `d_y` [N, out]."""
    return _product(d_y, ends, weights, None, True, instruction_set).to(d_y.dtype)


def _activate(gate_up: Tensor, d_out: Tensor | None, to: Tensor, alpha: float, limit: float) -> Tensor:
    functions, best, parallel = library()
    functions.gptoss_swiglu(
        best,
        gate_up.dtype == torch.bfloat16,
        gate_up.data_ptr(),
        None if d_out is None else d_out.data_ptr(),
        to.data_ptr(),
        gate_up.numel() // 2,
        alpha,
        limit,
        parallel,
        torch.get_num_threads(),
    )
    return to


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`activation.swiglu` in one pass, in float32 inside; bfloat16 or float32."""
    gate_up = gate_up.contiguous()
    return _activate(gate_up, None, gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), alpha, limit)


def swiglu_backward(d_out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """`activation.swiglu_backward` in one pass."""
    gate_up = gate_up.contiguous()
    return _activate(gate_up, d_out.contiguous(), torch.empty_like(gate_up), alpha, limit)
