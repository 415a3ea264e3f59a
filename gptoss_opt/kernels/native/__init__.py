"""The native library for CPUs: found and loaded.

It is plain C (folder c), built when the package is installed if there is a compiler, and loaded on first use. Its
threads are those of torch's own OpenMP runtime, as many as `torch.get_num_threads()`: a second pool would compete with
torch's, whose threads go on spinning for a while after each operation.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..processor import has

FILE = Path(__file__).with_name("_native.so")
"""The library. It is for no Python in particular, and so has no Python's tag in its name: see setup.py."""
DTYPES = (torch.bfloat16, torch.float32)
AMX = "AMX"
X86_SETS = ("plain C", "AVX2", "AVX-512", "AVX-512 BF16", AMX)
ARM_SETS = ("NEON", "NEON", "NEON", "NEON with bfloat16", AMX)
INSTRUCTION_SETS = ARM_SETS if platform.machine() in ("aarch64", "arm64") else X86_SETS
"""By the numbers that the library has for them: see common.h."""
BFLOAT16 = 3
"""The first that multiplies bfloat16."""
LANES = 16
"""Values of a head that attention takes at a time."""
PANEL_WIDTH = 64
"""Those that its products in bfloat16 take."""
TILE_ROWS = 16
"""AMX takes rows in tiles of so many; room for them is needed for each expert."""

_P, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double


class Matrices(ctypes.Structure):
    """The weights of one projection as the library takes them, by their addresses: see native.c."""

    _fields_ = (("weights", _P), ("scales", _P), ("bias", _P), ("rows", _LONG), ("length", _LONG))
    tensors: tuple[Tensor | None, ...]
    """Those that lie there, contiguous: they stay alive as long as their addresses are held."""


class PagedArguments(ctypes.Structure):
    """The arguments of attention on pages as the library takes them, by addresses: see paged.h."""

    _fields_ = (
        *((name, _P) for name in ("q", "keys", "values", "sinks", "block_table", "context_starts", "blocks")),
        *((name, _P) for name in ("out", "lse")),
        *((name, _LONG) for name in ("heads", "kv_heads", "head_dim", "width", "page_size", "window", "max_rows")),
        ("scale", ctypes.c_float),
        ("half", _INT),
    )


class LinearArguments(ctypes.Structure):
    """The arguments of a linear layer as the library takes them, by addresses: see linear.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "weights", "bias", "out")),
        *((name, _LONG) for name in ("num_rows", "rows", "length")),
        ("half", _INT),
    )


class NormArguments(ctypes.Structure):
    """The arguments of RMS norms as the library takes them, by addresses: see norm.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "weight", "out")),
        *((name, _LONG) for name in ("num_rows", "length")),
        ("eps", ctypes.c_float),
        ("half", _INT),
    )


class RotaryArguments(ctypes.Structure):
    """The arguments of rotary position embeddings as the library takes them, by addresses: see rotary.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "cos", "sin", "out")),
        *((name, _LONG) for name in ("heads", "num_tokens", "head_dim", "row", "head", "token", "angles")),
        ("half", _INT),
    )


class LowRankArguments(ctypes.Structure):
    """The arguments of low-rank products as the library takes them, by addresses: see low_rank.h."""

    _fields_ = (
        ("offsets", _P),
        *((name, _LONG) for name in ("num_experts", "rank", "length")),
        *((name, _P) for name in ("factor", "hidden", "rows", "sums")),
        ("half", _INT),
    )


class LayerArguments(ctypes.Structure):
    """A decoder layer as the library takes it, by the addresses of its weights: see layer.h."""

    _fields_ = (
        *((name, _P) for name in ("input_norm", "q", "q_bias", "k", "k_bias", "v", "v_bias", "sinks", "o", "o_bias")),
        *((name, _P) for name in ("post_norm", "router", "router_bias")),
        *((name, Matrices) for name in ("gate_up", "down")),
        *((name, _LONG) for name in ("hidden", "heads", "kv_heads", "head_dim", "num_experts", "top_k", "window")),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "scale")),
        *((name, _DOUBLE) for name in ("alpha", "limit")),
        ("half", _INT),
    )


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
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def why_no_attention(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the native library cannot serve attention, or None."""
    if reason := why_not(device_type, dtype):
        return reason
    return f"needs a head_dim that is a multiple of {LANES}, not {head_dim}" if head_dim % LANES else None


def multiplies_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention of several queries is made of products in bfloat16 here, which torch's are slower than."""
    known = INSTRUCTION_SETS is X86_SETS and library().best >= BFLOAT16
    return known and dtype == torch.bfloat16 and head_dim % PANEL_WIDTH == 0


def check_memory(status: int) -> None:
    """Raise `MemoryError` if a function of the library says, by what it returned, that it found no memory."""
    if status:
        raise MemoryError("the native kernel found no memory for its scratch space.")


@cache
def library() -> Library:
    """The native library, loaded."""
    loaded = _loaded()
    assert isinstance(loaded, Library), loaded
    return loaded


def computes_on() -> str:
    """The instruction set that the library uses, in words; and, where the CPU has AMX and it is left aside, why.

    Example:
        >>> computes_on().startswith(INSTRUCTION_SETS)
        True
    """
    best = INSTRUCTION_SETS[library().best]
    if best == AMX or not has("amx_bf16"):
        return best
    return f"{best} (not on {AMX}: Linux refused this process its tiles, or the compiler was older than gcc 11)"


@cache
def _loaded() -> Library | str:
    if not FILE.exists():
        return "was not built when gptoss_opt was installed: install a C compiler, then gptoss_opt again"
    try:
        return _load(str(FILE))
    except (OSError, AttributeError) as error:
        return f"could not be loaded ({error}): install gptoss_opt again"


def _load(path: str) -> Library:
    functions = ctypes.CDLL(path)
    weights = ctypes.POINTER(Matrices)
    functions.gptoss_product.argtypes = [_INT, _INT, *[_P] * 3, weights, _P, _LONG, _P, _INT]
    functions.gptoss_experts.argtypes = [_INT, *[_P] * 3, *[weights] * 2, _P, *[_LONG] * 3, *[_DOUBLE] * 2, _P, _INT]
    functions.gptoss_swiglu.argtypes = [_INT, _INT, *[_P] * 3, _LONG, *[_DOUBLE] * 2, _P, _INT]
    functions.gptoss_unpack.argtypes = [_INT, *[_P] * 3, _LONG, _P, _INT]
    functions.gptoss_paged_attention.argtypes = [_INT, ctypes.POINTER(PagedArguments), _LONG, _P, _INT]
    functions.gptoss_linear.argtypes = [_INT, ctypes.POINTER(LinearArguments), _P, _INT]
    functions.gptoss_norm.argtypes = [_INT, ctypes.POINTER(NormArguments), _P, _INT]
    functions.gptoss_rotary.argtypes = [_INT, ctypes.POINTER(RotaryArguments), _LONG, _P, _INT]
    functions.gptoss_low_rank.argtypes = [_INT, _INT, ctypes.POINTER(LowRankArguments), _P, _INT]
    layer = ctypes.POINTER(LayerArguments)
    functions.gptoss_layer_before.argtypes = [_INT, layer, *[_P] * 6, *[_LONG] * 2, _P, _INT]
    functions.gptoss_layer_between.argtypes = [_INT, layer, *[_P] * 7, *[_LONG] * 2, _P, _INT]
    functions.gptoss_layer_after.argtypes = [_INT, layer, *[_P] * 5, _LONG, _P, _INT]
    functions.gptoss_pack.argtypes = [_INT, _INT, *[_P] * 3, _LONG, _P, _INT]
    functions.gptoss_pack_columns.argtypes = [_INT, _INT, *[_P] * 4, _LONG, _LONG, _P, _INT]
    return Library(functions, functions.gptoss_init(), _fork_join())


def _fork_join() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the OpenMP runtime that torch has loaded; None where it has another, or none."""
    if sys.platform != "linux":
        return None
    # The name of a file is the sixth field, and may hold spaces.
    fields = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    names = {line[5] for line in fields if len(line) == 6}
    found = sorted(name for name in names if re.match(r"lib[gi]?omp[^/]*\.so", Path(name).name))
    home = str(Path(torch.__file__).parent)
    for path in sorted(found, key=lambda path: not path.startswith(home)):
        try:
            runtime = ctypes.CDLL(path)
        except OSError:  # replaced on disk since: any other will do
            continue
        if hasattr(runtime, "GOMP_parallel"):
            return ctypes.cast(runtime.GOMP_parallel, _P)
    return None
