"""Triton kernels in Triton's interpreter, and compiled for GPUs that need not be there.

Triton reads TRITON_INTERPRET when it is imported, and anything may have imported it by now. So checks run in a process
of their own; where there is a GPU, a second time on it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of a program at most, by compute capability."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def in_a_process_of_its_own(interpret: str, prefix: str, file: str) -> None:
    """Run the functions of a file whose names begin with a prefix as tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"python_functions={prefix}_*", file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def compiled(
    kernel: Any, capability: int, types: list[str], sizes: dict[str, int], num_warps: int = 4, num_stages: int = 3
) -> Any:
    """A kernel, compiled for arguments of these types."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(sizes)], strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind.startswith("*")}
    source = ASTSource(kernel, signature=signature, constexprs=sizes, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


# What the interpreter lacks: it keeps bfloat16 as bits, and multiplies the bits.


def teach_bfloat16() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(handle: Any) -> Any:
        bits = handle.data
        return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits

    def narrow(data: Any) -> Any:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    plain = interpreter.InterpreterBuilder

    def create_fmul(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            return narrow(widen(a) * widen(b))
        return self.binary_op(a, b, np.multiply)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(widen(a), widen(b), dtype=np.float32) + acc.data, acc.dtype.scalar)

    cast = plain.create_fp_trunc

    def create_fp_trunc(self: Any, x: Any, dtype: Any) -> Any:
        return narrow(x.data) if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16) else cast(self, x, dtype)

    patch_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # numpy 2.4 makes no number of an array of one.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    plain.create_fmul, plain.create_dot, plain.create_fp_trunc = create_fmul, create_dot, create_fp_trunc
    plain.get_bf16 = lambda self, value: narrow(np.array([value], np.float32))
    interpreter._patch_lang_tensor = _patch_lang_tensor


if INTERPRETING:
    teach_bfloat16()
