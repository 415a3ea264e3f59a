"""The table of which kernel computes when: it is well formed, it decides, and what was not measured has a default."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gptoss_opt import explain, with_fast_experts, with_mxfp4_experts
from gptoss_opt.kernels import kernel_table, native
from gptoss_opt.kernels.experts import (
    DENSE_BACKENDS,
    PACKED_BACKENDS,
    DenseWeights,
    ExpertsRequest,
    PackedWeights,
    experts,
    one_by_one,
)
from gptoss_opt.kernels.experts.impl.native import NATIVE, NATIVE_DENSE
from gptoss_opt.kernels.mxfp4 import pack
from gptoss_opt.kernels.processor import KNOWN
from tests.helpers import relative, tiny_model

if native.why_not("cpu", torch.float32):
    pytest.skip("no native library here", allow_module_level=True)

EXPERTS = (kernel_table.PACKED_EXPERTS, kernel_table.DENSE_EXPERTS)


def test_the_table_is_well_formed() -> None:
    for (name, instruction_set), rows in kernel_table.TABLE.items():
        assert name in KNOWN.values()
        assert instruction_set in native.INSTRUCTION_SETS
        for (projection, dtype), ranges in rows.items():
            assert projection in (*kernel_table.LINEARS, *EXPERTS)
            assert dtype in native.DTYPES
            *first, (last, _) = ranges
            assert last is None
            assert sorted({most for most, _ in first}) == [most for most, _ in first]
            assert all(kernel != after for (_, kernel), (_, after) in pairwise(ranges))


def test_ranges_end_with_their_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = ((2, "native"), (8, "torch"), (None, "native"))
    monkeypatch.setattr(kernel_table, "measured", lambda: {("q_proj", torch.float32): ranges})
    found = [kernel_table.kernel_for("q_proj", torch.float32, rows) for rows in (0.5, 2, 2.5, 8, 9)]
    assert found == ["native", "native", "torch", "torch", "native"]
    assert kernel_table.described("q_proj", torch.float32).startswith(
        "native up to 2 rows, torch up to 8 rows, native for more ("
    )


def test_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "measured", dict)
    assert kernel_table.kernel_for("q_proj", torch.float32, 1) == "torch"
    assert [kernel_table.kernel_for(name, torch.bfloat16, 1000) for name in EXPERTS] == ["native", "torch"]
    reason = NATIVE_DENSE.why_not(ExpertsRequest("cpu", torch.bfloat16, (64, 64)))
    assert reason is not None
    assert ("not measured" in reason) == (native.library().best >= native.BFLOAT16)
    assert "(not measured on" in kernel_table.described("q_proj", torch.float32)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("grad", [False, True])
def test_experts_go_to_torch_from_so_many_rows_on(kind: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == kernel_table.DENSE_EXPERTS and native.library().best < native.BFLOAT16:
        pytest.skip("no dense products by the native library here")
    monkeypatch.setattr(kernel_table, "measured", lambda: {(kind, torch.bfloat16): ((4, "native"), (None, "torch"))})
    kernel, weights = NATIVE, []
    for width, inner in ((192, 64), (64, 96)):
        bias = torch.randn(3, width).bfloat16()
        packed = PackedWeights(*pack(torch.randn(3, width, inner) / inner**0.5), bias)
        dense = torch.stack([packed.expert(e, bias) for e in range(3)]).contiguous()
        weights.append(packed if kind == kernel_table.PACKED_EXPERTS else DenseWeights(dense, bias))
    if kind == kernel_table.DENSE_EXPERTS:
        kernel = NATIVE_DENSE
    seen: list[int] = []
    for name in ("product", "input_gradient"):
        real = getattr(one_by_one, name)
        monkeypatch.setattr(one_by_one, name, lambda *args, real=real: seen.append(len(args[0])) or real(*args))

    def outcome(tokens: int, backend: str) -> list[Tensor]:
        torch.manual_seed(tokens)
        x = torch.randn(tokens, 64).bfloat16().requires_grad_(grad)
        indices, shares = torch.randint(-1, 4, (tokens, 2)), torch.rand(tokens, 2).bfloat16()
        out = experts(x, indices, shares, *weights, alpha=1.702, limit=7.0, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), x)] if grad else [out]

    for tokens, by_torch in ((6, False), (7, True)):
        expected = outcome(tokens, "reference")
        seen.clear()
        for found, exact in zip(outcome(tokens, kernel.name), expected, strict=True):
            assert relative(found, exact) < 1e-2
        assert bool(seen) == by_torch
    # An instruction set that is asked for is what computes.
    seen.clear()
    x, offsets = torch.randn(30, 64).bfloat16(), torch.tensor([10, 20, 30], dtype=torch.int32)
    kernel.forward(x, offsets, replace(weights[0], bias=None), instruction_set=native.library().best)
    assert not seen


def test_explain_names_the_row() -> None:
    for wrapper, backends, kind in (
        (with_mxfp4_experts, PACKED_BACKENDS, EXPERTS[0]),
        (with_fast_experts, DENSE_BACKENDS, EXPERTS[1]),
    ):
        row = explain(wrapper(tiny_model(torch.bfloat16))).rows[0]
        assert row.backend in {backend.name for backend in backends}
        said = any(kernel_table.described(kind, torch.bfloat16) in line for line in row.changed)
        assert said == (row.backend == "native")
