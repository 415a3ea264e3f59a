"""The Triton kernels of packed experts, in Triton's interpreter, and compiled for GPUs that need not be there.

Triton reads TRITON_INTERPRET when it is imported, and anything may have imported it by now. So the checks below run in
a process of their own; where there is a GPU, a second time on it.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from gptoss_opt.kernels import triton
from gptoss_opt.kernels.experts import DenseWeights, PackedWeights, Routes, experts
from gptoss_opt.kernels.experts.fused_cuda import _kernels as fused_kernels
from gptoss_opt.kernels.experts.fused_cuda import fused, route
from gptoss_opt.kernels.experts.impl import torch_grouped
from gptoss_opt.kernels.experts.impl import triton as triton_packed
from gptoss_opt.kernels.experts.impl.triton import TRITON
from gptoss_opt.kernels.mxfp4 import unpack
from tests.helpers import assert_as_exact, relative
from tests.kernels.triton_apart import DEVICE, SHARED_MEMORY, compiled, in_a_process_of_its_own, needs_triton


@needs_triton
@pytest.mark.parametrize(
    ("interpret", "prefix"), [("1", "check"), ("0", "compile"), pytest.param("0", "check", marks=pytest.mark.gpu)]
)
def test_in_a_process_of_its_own(interpret: str, prefix: str) -> None:
    in_a_process_of_its_own(interpret, prefix, __file__)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton.why_not("cpu", torch.bfloat16) == "needs CUDA, and the model is on cpu"
    assert "float64" in str(triton.why_not("cuda", torch.float64))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.why_not("cuda", torch.bfloat16) == "the package triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton.metadata, "version", lambda name: "3.1.0")
    assert triton.why_not("cuda", torch.bfloat16) == "needs triton 3.2 or newer, not 3.1.0"
    monkeypatch.setattr(triton.metadata, "version", lambda name: "3.2.0+git")
    assert triton.why_not("cuda", torch.bfloat16) is None


# The checks: products.

SHAPES = {  # experts, out features, blocks of 32 input features, offsets, rows
    "one expert": (1, 34, 1, [5], 5),
    "empty experts": (4, 33, 3, [0, 7, 7, 26], 26),
    "rows of no expert": (3, 70, 9, [3, 20, 21], 40),
    "only rows of no expert": (2, 16, 2, [0, 0], 3),
    "one row": (5, 65, 2, [0, 0, 1, 1, 1], 1),
    "many row tiles": (2, 8, 1, [70, 171], 180),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(num_experts: int, out_features: int, num_scales: int) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(256, (num_experts, out_features, num_scales, 16), dtype=torch.uint8)
    return blocks.to(DEVICE), torch.randint(118, 130, (num_experts, out_features, num_scales), dtype=torch.uint8).to(
        DEVICE
    )


def by_expert(rows: Tensor, offsets: list[int], weights: Tensor) -> Tensor:
    """`rows[n] @ weights[expert of n]`, expert by expert, in the dtype of the rows."""
    out = rows.new_zeros(len(rows), weights.shape[-1])
    for begin, end, weight in zip([0, *offsets], offsets, weights, strict=False):
        out[begin:end] = rows[begin:end] @ weight
    return out


def assert_within_budget(out: Tensor, rows: Tensor, offsets: list[int], weights: Tensor) -> None:
    """At most twice the error of plain products in the dtype of the rows, and as many roundings of the largest."""
    exact = by_expert(rows.double(), offsets, weights)
    plain = by_expert(rows, offsets, weights.to(rows.dtype))
    allowed = 2 * ((plain - exact).abs().max() + torch.finfo(rows.dtype).eps * exact.abs().max())
    assert out.dtype == rows.dtype
    assert (out - exact).abs().max() <= allowed
    if exact.any():
        assert relative(out.double(), exact) <= 2 * (relative(plain.double(), exact) + torch.finfo(rows.dtype).eps)
    assert not out[offsets[-1] :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def check_products(shape: str, dtype: torch.dtype) -> None:
    num_experts, out_features, num_scales, offsets, num_rows = SHAPES[shape]
    blocks, scales = packed(num_experts, out_features, num_scales)
    weights = unpack(blocks, scales, torch.float64)
    offsets_there = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    x = torch.randn(num_rows, num_scales * 32, device=DEVICE).to(dtype)
    y = TRITON.forward(x, offsets_there, PackedWeights(blocks, scales))
    assert_within_budget(y, x, offsets, weights.transpose(1, 2))
    dy = torch.randn(num_rows, out_features, device=DEVICE).to(dtype)
    assert_within_budget(TRITON.backward(dy, offsets_there, PackedWeights(blocks, scales)), dy, offsets, weights)
    if offsets[-1]:
        # What is compared depends on the order of nibbles, on the scales, and on which expert is whose.
        swapped = blocks << 4 | blocks >> 4
        for other in (
            TRITON.forward(x, offsets_there, PackedWeights(swapped, scales)),
            TRITON.forward(x, offsets_there, PackedWeights(blocks, scales + 1)),
            TRITON.forward(x, offsets_there, PackedWeights(blocks.roll(1, 1), scales)),
        ):
            assert relative(other.double(), y.double()) > 0.1


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("index", range(len(triton_packed.TILES)))
def check_every_tile(index: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry of the tables, whatever the number of rows, with edges in every dim."""
    tables = triton_packed.TILES, triton_packed.BACKWARD_TILES
    chosen = iter([table[min(index, len(table) - 1)][1] for table in tables])
    monkeypatch.setattr(triton_packed, "_tile", lambda *_: next(chosen))
    blocks, scales = packed(3, 150, 11)
    weights, offsets = unpack(blocks, scales, torch.float64), [9, 9, 150]
    offsets_there = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    x, dy = (torch.randn(155, n, device=DEVICE).to(dtype) for n in (352, 150))
    assert_within_budget(
        TRITON.forward(x, offsets_there, PackedWeights(blocks, scales)), x, offsets, weights.transpose(1, 2)
    )
    assert_within_budget(TRITON.backward(dy, offsets_there, PackedWeights(blocks, scales)), dy, offsets, weights)


def check_no_rows() -> None:
    blocks, scales = packed(2, 6, 1)
    offsets = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert TRITON.forward(torch.empty(0, 32, device=DEVICE), offsets, PackedWeights(blocks, scales)).shape == (0, 6)
    assert TRITON.backward(torch.empty(0, 6, device=DEVICE), offsets, PackedWeights(blocks, scales)).shape == (0, 32)


def check_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of many rows: dequantised weights, and torch's grouped product."""
    monkeypatch.setattr(triton_packed, "_goes_dense", lambda *_: True)
    blocks, scales = packed(3, 24, 2)
    offsets_there = torch.tensor([4, 4, 9], dtype=torch.int32, device=DEVICE)
    weights = unpack(blocks, scales, torch.float64)
    x, dy = (torch.randn(12, n, device=DEVICE).bfloat16() for n in (64, 24))
    y = TRITON.forward(x, offsets_there, PackedWeights(blocks, scales))
    assert_within_budget(y, x, [4, 4, 9], weights.transpose(1, 2))
    assert_within_budget(TRITON.backward(dy, offsets_there, PackedWeights(blocks, scales)), dy, [4, 4, 9], weights)


# The checks: values.


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def check_every_byte_under_every_scale(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 256, 1).repeat(1, 1, 16)
    values, expected = triton_packed.unpack(blocks, scales, dtype), unpack(blocks, scales, dtype)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values[0, :255].signbit(), expected[0, :255].signbit())
    assert values[0, 255].isnan().all()
    # Products see the same values: rows of the identity read out those of finite scales.
    offsets = torch.tensor([64], dtype=torch.int32, device=DEVICE)
    some = slice(0, 141 if dtype == torch.float16 else 252)
    parts = (x[:, some, [3, 11]].contiguous() for x in (blocks, scales))
    y = TRITON.forward(torch.eye(64, device=DEVICE, dtype=dtype), offsets, PackedWeights(*parts))
    torch.testing.assert_close(y.T, expected.unflatten(-1, (16, 32))[0, some, [3, 11]].flatten(-2), rtol=0, atol=0)


def check_nan_stays_in_its_rows() -> None:
    blocks, scales = packed(2, 20, 2)
    scales[1, 3, 1] = 255
    offsets = torch.tensor([3, 7], dtype=torch.int32, device=DEVICE)
    y = TRITON.forward(torch.randn(8, 64, device=DEVICE), offsets, PackedWeights(blocks, scales))
    expected = torch.zeros(8, 20, dtype=torch.bool, device=DEVICE)
    expected[3:7, 3] = True
    assert torch.equal(y.isnan(), expected)
    dx = TRITON.backward(torch.randn(8, 20, device=DEVICE), offsets, PackedWeights(blocks, scales))
    assert dx[3:7, 32:].isnan().all()
    assert not dx[:3].isnan().any()
    assert not dx[3:7, :32].isnan().any()


# The checks: activation.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 2 * 33), (1, 2), (3, 2 * 700), (0, 8)])
def check_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    def plain(gate_up: Tensor, limit: float = 7.0) -> Tensor:
        gate, up = gate_up[:, 0::2].clamp(max=limit), gate_up[:, 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    raw = (torch.randn(shape, device=DEVICE) * 6).to(dtype)
    raw[: shape[0] // 2, :4] = torch.tensor([7.0, 7.0, 7.0, -7.0]).to(raw)[: shape[1]]
    dh = torch.randn(shape[0], shape[1] // 2, device=DEVICE).to(dtype)
    exact_input = raw.double().requires_grad_()
    exact = plain(exact_input)
    exact.backward(dh.double())
    results = TRITON.swiglu(raw, 1.702, 7.0), TRITON.swiglu_backward(dh, raw, 1.702, 7.0)
    assert exact_input.grad is not None
    for result, wanted in zip(results, (exact.detach(), exact_input.grad), strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    if shape[0] > 1:
        assert relative(plain(raw.double(), 6.0), exact.detach()) > 1e-3


def check_swiglu_keeps_nan() -> None:
    assert TRITON.swiglu(torch.full((1, 2), torch.nan, device=DEVICE), 1.702, 7.0).isnan().all()


# The checks: all of it.


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (3, 4), (700, 5), (300, 32)])
def check_routes(num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    # With routes to experts that are not here.
    indices = torch.randint(-1, num_experts + 1, (num_tokens, 4), device=DEVICE).to(dtype)
    found, expected = route(indices, num_experts), Routes.of(indices, num_experts)
    assert found.top_k == 4
    for name in ("order", "inverse", "offsets"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 9])
def check_fused(num_tokens: int, biased: bool, dtype: torch.dtype) -> None:
    num_experts, hidden, pairs, top_k = 5, 64, 32, 3
    weights = []
    for num_out, num_in in ((2 * pairs, hidden), (hidden, pairs)):
        blocks, scales = packed(num_experts, num_out, num_in // 32)
        bias = torch.randn(num_experts, num_out, device=DEVICE).to(dtype) if biased else None
        weights.append(PackedWeights(blocks, scales, bias))
    x = (torch.randn(num_tokens, hidden, device=DEVICE) / 64).to(dtype)
    scores, indices = torch.randn(num_tokens, num_experts + 1, device=DEVICE).topk(top_k)
    shares = scores.softmax(-1).to(dtype)

    def computed(kind: torch.dtype) -> Tensor:
        at = [PackedWeights(one.blocks, one.scales, None if one.bias is None else one.bias.to(kind)) for one in weights]
        return experts(x.to(kind), indices, shares.to(kind), *at, alpha=1.702, limit=7.0, backend="reference")

    compute = TRITON.fused_for(x, indices, weights[0])
    assert compute is not None
    found, plain, exact = compute(x, indices, shares, *weights, 1.702, 7.0), computed(dtype), computed(torch.float64)
    assert_as_exact(("out",), [found], [plain], [exact])
    other = compute(x, indices.flip(-1), shares, *weights, 1.702, 7.0)
    assert relative(other.double(), exact) > 0.1
    if dtype != torch.float16:  # which torch's grouped product does not take everywhere
        dense = [DenseWeights(unpack(*one.tensors, dtype).mT.contiguous(), one.bias) for one in weights]
        alike = fused(torch_grouped._product_of_known, x, indices, shares, *dense, 1.702, 7.0)
        assert_as_exact(("out",), [alike], [plain], [exact])


# Real compilation, which needs no GPU: what the interpreter accepts need not compile, nor fit.


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name", ["forward_kernel", "backward_input_kernel"])
def compile_tiles(name: str, capability: int) -> None:
    kernel = getattr(triton_packed._kernels(), name)
    tiles = triton_packed.TILES if name == "forward_kernel" else triton_packed.BACKWARD_TILES
    for element, tile in [
        *(("bf16", tile) for _, tile in tiles),
        ("fp16", tiles[0][1]),
        ("fp32", triton_packed.FLOAT32_TILE),
    ]:
        sizes = {"BLOCK_N": tile.rows, "BLOCK_O": tile.out, "BLOCK_K": tile.depth, "BLOCK_E": 64, "GROUP": 8}
        pointers = [f"*{element}", "*i32", "*i32", "*u8", f"*{element}"]
        made = compiled(kernel, capability, [*pointers, *["i32"] * 4], sizes, tile.num_warps, tile.num_stages)
        assert made.metadata.shared <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
def compile_the_others(element: str) -> None:
    kernels = triton_packed._kernels()
    compiled(kernels.unpack_kernel, 90, ["*i32", "*u8", f"*{element}", "i32"], {"BLOCK_G": 64})
    for name, num_pointers in (("swiglu_kernel", 2), ("swiglu_backward_kernel", 3)):
        compiled(getattr(kernels, name), 90, [*[f"*{element}"] * num_pointers, "i32", "fp32", "fp32"], {"BLOCK": 1024})


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
def compile_what_lies_around(element: str, capability: int) -> None:
    kernels, one = fused_kernels(), f"*{element}"
    for index in ("*i64", "*i32"):
        types = [index, "*i64", "*i64", "*i32", "i32", "i32", "i32"]
        compiled(kernels.route_kernel, capability, types, {"BLOCK": 1024})
        sizes = {"TOP_K": 4, "HAS_BIAS": True, "BLOCK": 1024}
        compiled(kernels.combine_kernel, capability, [one, one, index, "*i64", one, one, "i32", "i32"], sizes)
    types = [one, one, "*i32", one, "i32", "i32", "fp32", "fp32"]
    compiled(kernels.bias_and_swiglu_kernel, capability, types, {"HAS_BIAS": True, "BLOCK": 1024, "BLOCK_E": 64})
