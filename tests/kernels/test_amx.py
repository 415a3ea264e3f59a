"""The products on AMX, whose tile instructions are played in plain C where the processor has none."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt.kernels import native as package
from gptoss_opt.kernels.experts import DenseWeights, PackedWeights
from gptoss_opt.kernels.experts.impl import native as module
from gptoss_opt.kernels.experts.impl.native import NATIVE, NATIVE_DENSE
from gptoss_opt.kernels.mxfp4 import pack, unpack
from tests.helpers import relative
from tests.kernels.built import SOURCES, built

AMX = package.INSTRUCTION_SETS.index("AMX")
COMPILER = shutil.which("cc") or shutil.which("gcc")
BOUND = 4e-3
"""What rounding the result to bfloat16 allows."""

if package.why_not("cpu", torch.bfloat16) or package.library().best < package.BFLOAT16 or not COMPILER:
    pytest.skip("takes AVX-512 BF16 and a C compiler", allow_module_level=True)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> package.Library:
    """The library as the package builds it, but for tiles."""
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-Wno-psabi", "-DPLAY_TILES"]
    return package._load(str(built(tmp_path_factory, SOURCES / "native.c", str(COMPILER), *options)))


@pytest.fixture(autouse=True)
def _with_tiles(played: package.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert played.best == AMX
    monkeypatch.setattr(module, "library", lambda: played)


SHAPES = [(3, 64, 96), (4, 96, 64), (2, 160, 224), (2, 128, 40), (3, 32, 32)]
COUNTS = {
    "whole tiles": [16, 32, 64, 16],
    "the last overlaps": [17, 31, 33, 47],
    "few rows beside many": [1, 100, 15, 16],
    "experts without rows": [0, 40, 0, 3],
    "no rows": [0, 0, 0, 0],
}


def problem(
    shape: tuple[int, int, int], counts: list[int], transposed: bool
) -> tuple[Tensor, Tensor, Any, Any, Tensor]:
    """Rows, offsets, packed and dense weights of the same values, and their product in float64."""
    num_experts, num_in, num_out = shape
    blocks, scales = pack(torch.randn(num_experts, num_out, num_in))
    weight, bias = unpack(blocks, scales).mT, torch.randn(num_experts, num_out).bfloat16()
    counts = counts[:num_experts]
    x = torch.randn(sum(counts) + 3, num_out if transposed else num_in).bfloat16()
    exact, begin = torch.zeros(len(x), num_in if transposed else num_out, dtype=torch.float64), 0
    for e, count in enumerate(counts):
        rows, wide = slice(begin, begin + count), weight[e].double()
        exact[rows] = x[rows].double() @ (wide.T if transposed else wide) + (0 if transposed else bias[e].double())
        begin += count
    dense = DenseWeights(weight.contiguous().bfloat16(), bias)
    return x, torch.tensor(counts).cumsum(0).int(), PackedWeights(blocks, scales, bias), dense, exact


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], kind: str, transposed: bool) -> None:
    x, offsets, packed, dense, exact = problem(shape, COUNTS[kind], transposed)
    contenders: list[tuple[Any, Any]] = [(NATIVE, packed)]
    if shape[2] % 32 == 0:  # dense weights are taken in such sizes
        contenders.append((NATIVE_DENSE, dense))
    for backend, weights in contenders:
        product = backend.backward if transposed else backend.forward
        found = product(x, offsets, weights, instruction_set=AMX)
        assert (found - exact).norm() <= BOUND * exact.norm()
        assert not found[int(offsets[-1]) :].any()


def test_a_weight_that_is_off_is_noticed() -> None:
    """Negative control, in each corner of the tiles."""
    for transposed in (False, True):
        x, offsets, packed, _, exact = problem((1, 64, 96), [33], transposed)
        for row, block in ((0, 0), (95, 1), (31, 1), (32, 0)):
            before = packed.scales[0, row, block].clone()
            packed.scales[0, row, block] += 2
            found = (NATIVE.backward if transposed else NATIVE.forward)(x, offsets, packed, instruction_set=AMX)
            assert relative(found, exact) > 5 * BOUND
            packed.scales[0, row, block] = before


@pytest.mark.parametrize("num_tokens", [1, 16, 70])
def test_a_whole_layer(num_tokens: int) -> None:
    num_experts, hidden, inner = 4, 64, 96
    gate_up = PackedWeights(*pack(torch.randn(num_experts, 2 * inner, hidden) / 8), torch.randn(num_experts, 2 * inner))
    down = PackedWeights(*pack(torch.randn(num_experts, hidden, inner) / 8), torch.randn(num_experts, hidden))
    x = torch.randn(num_tokens, hidden).bfloat16()
    scores, indices = torch.randn(num_tokens, num_experts).topk(2)
    indices[-1, 0] = num_experts  # of another rank
    arguments = (x, indices, scores.softmax(-1), gate_up, down, 1.702, 7.0)
    found = NATIVE.fused(*arguments, instruction_set=AMX)
    assert relative(found, NATIVE.fused(*arguments, instruction_set=0)) < 2 * BOUND
    for weights in (gate_up, down):
        weights.scales[:, 5] += 3
    assert relative(found, NATIVE.fused(*arguments, instruction_set=0)) > 5 * BOUND


def test_rows_do_not_depend_on_threads() -> None:
    x, offsets, packed, _, _ = problem((4, 96, 512), [40, 16, 70, 5], False)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(NATIVE.forward(x, offsets, packed, instruction_set=AMX))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
