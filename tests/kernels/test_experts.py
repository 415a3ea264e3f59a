"""Every backend of the experts computes what a float64 loop over all experts says, forward and backward."""

from __future__ import annotations

import ctypes
import math
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gptoss_opt import explain, with_mxfp4_experts
from gptoss_opt.kernels import native as native_library
from gptoss_opt.kernels.experts import (
    DENSE_BACKENDS,
    PACKED_BACKENDS,
    DenseWeights,
    ExpertsRequest,
    PackedWeights,
    Routes,
    experts,
)
from gptoss_opt.kernels.experts.clamp import passes_at_limits
from gptoss_opt.kernels.experts.impl.native import NATIVE as native
from gptoss_opt.kernels.experts.impl.native import NATIVE_DENSE as native_dense
from gptoss_opt.kernels.experts.impl.reference import REFERENCE as reference
from gptoss_opt.kernels.mxfp4 import FP4_VALUES, pack
from tests.helpers import assert_as_exact, differentiate, relative, tiny_model

ALPHA, LIMIT = 1.702, 7.0


def backends(dtype: torch.dtype) -> list[str]:
    """The backends for packed and for dense weights that serve a dtype on this CPU."""
    kinds = (("packed", PACKED_BACKENDS), ("dense", DENSE_BACKENDS))
    request = ExpertsRequest("cpu", dtype)
    return [f"{kind} {one.name}" for kind, them in kinds for one in them if one.why_not(request) is None]


BACKENDS = backends(torch.float32)
EACH = [(backend, dtype) for dtype in (torch.float32, torch.bfloat16) for backend in backends(dtype)]
NAMES = ("out", "dx", "d_routing", "d_gate_up_bias", "d_down_bias", "d_gate_up", "d_down")

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    # experts, hidden, intermediate, tokens, per token
    "one expert": (1, 32, 32, 5, 1),
    "every expert": (4, 64, 32, 9, 4),
    "one token": (4, 64, 96, 1, 2),
    "no token": (4, 64, 96, 0, 2),
    "a hundred tokens": (4, 96, 32, 100, 2),
    "most experts without a token": (16, 32, 64, 3, 2),
    "all in one expert": (3, 160, 96, 110, 1),
}


def decoded(packed: PackedWeights) -> Tensor:
    """The weights [E, in, out] in float64, by the definition of the format."""
    codes = torch.stack((packed.blocks & 15, packed.blocks >> 4), -1).flatten(-2).long()
    values = torch.tensor(FP4_VALUES, dtype=torch.float64)[codes]
    return torch.ldexp(values, packed.scales[..., None].int() - 127).flatten(-2).mT


def truth(
    x: Tensor,
    routing_weights: Tensor,
    b1: Tensor,
    b2: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    indices: Tensor,
    limit: float = LIMIT,
) -> Tensor:
    """All tokens through every expert, weighted by what is routed there."""
    out = torch.zeros_like(x)
    for e in range(len(w1)):
        hidden = x @ w1[e] + b1[e]
        gate, up = hidden[:, 0::2].clamp(max=limit), hidden[:, 1::2].clamp(-limit, limit)
        y = ((up + 1) * gate / (1 + torch.exp(-ALPHA * gate))) @ w2[e] + b2[e]
        out = out + (routing_weights * (indices == e)).sum(-1, keepdim=True) * y
    return out


class Problem:
    """Tokens, routes and weights. The inputs are x, routing, biases, and dense weights, which packed ones go for."""

    def __init__(self, shape: str, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> None:
        num_experts, hidden, inner, tokens, top_k = SHAPES[shape]
        x = torch.randn(tokens, hidden) * spread
        self.indices = torch.rand(tokens, num_experts).argsort(-1)[:, :top_k]
        if shape == "all in one expert":
            self.indices.fill_(1)
        routing_weights = torch.rand(tokens, top_k).softmax(-1)
        self.packed = []
        for num_in, num_out in ((hidden, 2 * inner), (inner, hidden)):
            blocks, scales = pack(torch.randn(num_experts, num_out, num_in) / math.sqrt(num_in))
            self.packed.append(PackedWeights(blocks, scales))
        biases = [torch.randn(num_experts, width) * 0.3 for width in (2 * inner, hidden)]
        dense = [decoded(packed) for packed in self.packed]
        self.inputs = [tensor.to(dtype) for tensor in (x, routing_weights, *biases, *dense)]
        self.d_out = torch.randn(tokens, hidden).to(dtype)

    def run(self, backend: str, limit: float = LIMIT) -> Callable[..., Tensor]:
        kind, name = backend.split()

        def call(x: Tensor, routing_weights: Tensor, b1: Tensor, b2: Tensor, *given: Tensor) -> Tensor:
            dense = given or self.inputs[4:]
            if kind == "packed":
                weights = [replace(packed, bias=bias) for packed, bias in zip(self.packed, (b1, b2), strict=True)]
            else:
                weights = [DenseWeights(weight, bias) for weight, bias in zip(dense, (b1, b2), strict=True)]
            return experts(x, self.indices, routing_weights, *weights, alpha=ALPHA, limit=limit, backend=name)

        return call

    def given(self, backend: str) -> list[Tensor]:
        """The inputs that a backend is differentiable in."""
        return self.inputs if backend.startswith("dense") else self.inputs[:4]

    def truth(self, limit: float = LIMIT) -> list[Tensor]:
        def call(*x: Tensor) -> Tensor:
            return truth(*x, indices=self.indices, limit=limit)

        return differentiate(call, [x.double() for x in self.inputs], self.d_out)


def test_there_are_backends() -> None:
    assert BACKENDS == ["packed native", "packed reference", "dense torch", "dense reference"]
    assert set(backends(torch.bfloat16)) >= set(BACKENDS)
    assert backends(torch.float64) == ["packed reference", "dense reference"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(backend: str, shape: str) -> None:
    problem = Problem(shape)
    ours = differentiate(problem.run(backend), problem.given(backend), problem.d_out)
    for name, actual, exact in zip(NAMES, ours, problem.truth(), strict=False):
        assert actual.shape == exact.shape
        assert relative(actual, exact) < 1e-5, name


@pytest.mark.parametrize("backend", ["packed reference", "dense reference"])
def test_float64(backend: str) -> None:
    problem = Problem("a hundred tokens", torch.float64, spread=4)
    ours = differentiate(problem.run(backend, 3.0), problem.given(backend), problem.d_out)
    for name, actual, exact in zip(NAMES, ours, problem.truth(3.0), strict=False):
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_limit_holds_and_takes_the_gradient(backend: str) -> None:
    problem = Problem("a hundred tokens", spread=4)
    ours = differentiate(problem.run(backend, 2.0), problem.given(backend), problem.d_out)
    for name, actual, exact, free in zip(NAMES, ours, problem.truth(2.0), problem.truth(1e9), strict=False):
        assert relative(actual, exact) < 1e-5, name
        # What comes after the activation does not depend on it.
        assert relative(free, exact) > 0.1 or name == "d_down_bias", name


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "no token"])
@pytest.mark.parametrize("backend", backends(torch.bfloat16))
def test_error_budget(backend: str, shape: str) -> None:
    problem = Problem(shape, torch.bfloat16)
    given = problem.given(backend)
    ours = differentiate(problem.run(backend), given, problem.d_out)
    base = differentiate(problem.run("dense reference"), problem.inputs, problem.d_out)
    assert_as_exact(NAMES, ours, base, problem.truth())


def test_float16() -> None:
    problem = Problem("a hundred tokens", torch.float16)
    ours = differentiate(problem.run("dense torch"), problem.inputs, problem.d_out)
    base = differentiate(problem.run("dense reference"), problem.inputs, problem.d_out)
    assert_as_exact(NAMES, ours, base, problem.truth())


def controls(problem: Problem) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Mistakes, by name, each as the output that it gives."""

    def run(**changes: Any) -> Tensor:
        wrong = object.__new__(Problem)
        wrong.__dict__ = {**problem.__dict__, **changes}
        return wrong.run("packed native")(*wrong.inputs)

    x, routing_weights, b1, b2, *dense = problem.inputs
    swapped = [replace(p, blocks=(p.blocks >> 4) | (p.blocks << 4)) for p in problem.packed]
    rows = [replace(p, blocks=p.blocks.roll(1, 1), scales=p.scales.roll(1, 1)) for p in problem.packed]
    shifted = [replace(p, scales=p.scales.roll(1, 2)) for p in problem.packed]
    yield "nibbles swapped in gate_up", lambda: run(packed=[swapped[0], problem.packed[1]])
    yield "nibbles swapped in down", lambda: run(packed=[problem.packed[0], swapped[1]])
    yield "gate and up exchanged", lambda: run(packed=[rows[0], problem.packed[1]])
    yield "scales shifted by a block", lambda: run(packed=[shifted[0], problem.packed[1]])
    yield "no bias of gate_up", lambda: run(inputs=[x, routing_weights, 0 * b1, b2, *dense])
    yield "no bias of down", lambda: run(inputs=[x, routing_weights, b1, 0 * b2, *dense])
    yield "biases of another expert", lambda: run(inputs=[x, routing_weights, b1.roll(1, 0), b2, *dense])
    yield "one route to another expert", lambda: run(indices=torch.cat((problem.indices[:1] + 1, problem.indices[1:])))
    yield "weights of another token", lambda: run(inputs=[x, routing_weights.roll(1, 0), b1, b2, *dense])


def test_mistakes_are_noticed() -> None:
    problem = Problem("a hundred tokens")
    right = problem.truth()[0]
    assert relative(problem.run("packed native")(*problem.inputs), right) < 1e-5
    for name, mistake in controls(problem):
        assert relative(mistake(), right) > 1e-2, name


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_routes_to_no_expert_add_nothing(backend: str, dtype: torch.dtype) -> None:
    problem = Problem("a hundred tokens", dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    problem.indices[::3, 0] = -1
    problem.indices[1::3, 1] = 4
    problem.indices[2] = torch.tensor([1000, -1000])
    ours = differentiate(problem.run(backend), problem.given(backend), problem.d_out)
    for name, actual, exact in zip(NAMES, ours, problem.truth(), strict=False):
        assert relative(actual, exact) < tolerance, name
    assert not ours[0][2].any()
    # The input of every expert's weights that nobody is routed to is of no consequence, whatever memory holds.
    assert not ours[1][2].any()
    # Nothing at all here, as on a rank whose experts nobody wants.
    problem.indices.fill_(4)
    for actual in differentiate(problem.run(backend), problem.given(backend), problem.d_out):
        assert not actual.any()
    # Negative control: a route to the last expert counts.
    problem.indices[5, 1] = 3
    assert problem.run(backend)(*problem.inputs)[5].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_twice_for_a_token(backend: str) -> None:
    problem = Problem("a hundred tokens")
    problem.indices[7] = 2
    ours = differentiate(problem.run(backend), problem.given(backend), problem.d_out)
    for name, actual, exact in zip(NAMES, ours, problem.truth(), strict=False):
        assert relative(actual, exact) < 1e-5, name


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_inputs_of_any_layout_and_index_dtype(backend: str, dtype: torch.dtype) -> None:
    problem = Problem("a hundred tokens", dtype)
    run, expected = problem.run(backend), problem.run(backend)(*problem.inputs)
    strided = [torch.stack((x, x), -1)[..., 0] for x in problem.inputs[:4]]
    turned = [weight.mT.contiguous().mT for weight in problem.inputs[4:]]
    assert torch.equal(run(*strided, *problem.inputs[4:]), expected)
    assert relative(run(*strided, *turned), expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    for kind, packed in enumerate(problem.packed):
        blocks = torch.stack((packed.blocks, packed.blocks), -1)[..., 0]
        problem.packed[kind] = replace(packed, blocks=blocks, scales=packed.scales.mT.contiguous().mT)
    assert torch.equal(run(*problem.inputs), expected)
    problem.indices = problem.indices.int()
    assert torch.equal(run(*problem.inputs), expected)


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_without_biases_and_with_routing_in_float32(backend: str, dtype: torch.dtype) -> None:
    kind, name = backend.split()
    problem = Problem("every expert", dtype)
    x, routing_weights, b1, b2, *dense = problem.inputs
    weights = problem.packed if kind == "packed" else [DenseWeights(w) for w in dense]
    out = experts(x, problem.indices, routing_weights.float(), *weights, alpha=ALPHA, limit=LIMIT, backend=name)
    assert out.dtype == dtype
    exact = truth(*(t.double() for t in (x, routing_weights, 0 * b1, 0 * b2, *dense)), indices=problem.indices)
    assert relative(out, exact) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_same_bits_every_time(backend: str, dtype: torch.dtype) -> None:
    problem = Problem("a hundred tokens", dtype)
    one, two = (differentiate(problem.run(backend), problem.given(backend), problem.d_out) for _ in range(2))
    assert all(map(torch.equal, one, two))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("alone", [False, True])
def test_same_bits_on_any_number_of_threads(threads: Callable[[int], None], alone: bool, monkeypatch: Any) -> None:
    if alone:
        # Without the fork-join of torch's OpenMP runtime, on threads of its own.
        library = native_library.library()._replace(parallel=None)
        monkeypatch.setattr("gptoss_opt.kernels.experts.impl.native.library", lambda: library)
    for backend, dtype in [(backend, dtype) for backend, dtype in EACH if "native" in backend]:
        # Dense weights with their gradients apart: those are torch's own products.
        problem = Problem("all in one expert", dtype)
        results = []
        for number in (1, 2, 3):
            threads(number)
            gradients = differentiate(problem.run(backend), problem.given(backend)[:4], problem.d_out)
            results.append([*gradients, problem.run(backend)(*problem.inputs)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
    # The activation is cut into units too, of 4096 pairs.
    gate_up, d_out = torch.randn(5, 8200), torch.randn(5, 4100)
    results = []
    for number in (1, 2):
        threads(number)
        args = (gate_up, ALPHA, LIMIT)
        results.append(torch.cat((native.swiglu(*args), native.swiglu_backward(d_out, *args)), 1))
    assert torch.equal(*results)
    assert relative(results[0][:, :4100], reference.swiglu(gate_up.double(), ALPHA, LIMIT)) < 1e-6


# The native library.

SETS = range(len(native_library.INSTRUCTION_SETS))


def needs(which: int) -> None:
    if which > native_library.library().best:
        pytest.skip(f"this CPU has no {native_library.INSTRUCTION_SETS[which]}")


def exact_product(x: Tensor, offsets: list[int], packed: PackedWeights, backward: bool) -> Tensor:
    weights, rows, begin = decoded(packed), [], 0
    for e, end in enumerate(offsets):
        if backward:
            rows.append(x[begin:end].double() @ weights[e].T)
        else:
            bias = 0 if packed.bias is None else packed.bias[e].double()
            rows.append(x[begin:end].double() @ weights[e] + bias)
        begin = end
    width = weights.shape[1] if backward else weights.shape[2]
    return torch.cat([*rows, torch.zeros(len(x) - begin, width, dtype=torch.float64)])


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_product(dtype: torch.dtype, which: int) -> None:
    needs(which)
    # Rounded once, to bfloat16.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    # Numbers of rows and of outputs around the sizes of tiles and of what a thread takes at a time.
    shapes = [(1, 1, counts) for counts in ([0], [1], [2], [3, 5], [4, 6, 7], [9, 0, 13])]
    shapes += [(out, 3, [1, 2, 5]) for out in (2, 3, 5, 31, 33, 65)]
    shapes += [(out, 2, [6, 7, 13]) for out in (15, 17, 63, 64, 65, 127, 129, 200)]
    shapes += [(6, 2, [95]), (6, 5, [96]), (7, 1, [97, 193])]
    for num_out, num_blocks, counts in shapes:
        for with_bias in (True, False):
            size = (len(counts), num_out, num_blocks)
            blocks = torch.randint(256, (*size, 16), dtype=torch.uint8)
            bias = torch.randn(len(counts), num_out).to(dtype) if with_bias else None
            packed = PackedWeights(blocks, torch.randint(118, 130, size, dtype=torch.uint8), bias)
            offsets = torch.tensor(counts).cumsum(0)
            rows = int(offsets[-1]) + 2
            for backward, width in ((False, 32 * num_blocks), (True, num_out)):
                x = torch.randn(rows, width).to(dtype)
                function = native.backward if backward else native.forward
                y = function(x, offsets.int(), packed, instruction_set=which)
                assert y.dtype == dtype
                exact = exact_product(x, offsets.tolist(), packed, backward)
                assert y.shape == exact.shape
                assert relative(y, exact) < tolerance, (num_out, num_blocks, counts, with_bias, backward)
                assert not y[-2:].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_layer_in_one_native_call(dtype: torch.dtype, which: int, shape: str) -> None:
    needs(which)
    problem = Problem(shape, dtype)
    problem.indices[::3, 0] = -1
    problem.indices[1::3, -1] = SHAPES[shape][0]
    weights = [replace(p, bias=bias) for p, bias in zip(problem.packed, problem.inputs[2:4], strict=True)]

    def whole(*weights: DenseWeights | PackedWeights, indices: Tensor = problem.indices, limit: float = 1.0) -> Tensor:
        args = (*problem.inputs[:1], indices, problem.inputs[1], *weights, ALPHA, limit)
        return native.fused(*args, instruction_set=which)

    exact, given = problem.truth(1.0)[0], problem.inputs[2:4]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found = [whole(*weights)]
    if dtype == torch.bfloat16 and which == native_library.BFLOAT16:
        found.append(
            whole(*(DenseWeights(weight, bias) for weight, bias in zip(problem.inputs[4:], given, strict=True)))
        )
    for out in found:
        assert (out.dtype, out.shape) == (dtype, exact.shape)
        assert relative(out, exact) < tolerance
        assert torch.equal(out.abs().sum(-1) == 0, exact.abs().sum(-1) == 0)
    if shape == "a hundred tokens":
        # Negative controls: the limit, the biases and the routes count.
        assert relative(whole(*weights, limit=LIMIT), exact) > tolerance
        assert relative(whole(*problem.packed), exact) > tolerance
        assert relative(whole(*weights, indices=problem.indices.flip(0)), exact) > tolerance


@pytest.mark.parametrize("which", [*SETS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_under_every_scale_in_the_native_product(dtype: torch.dtype, which: int | None) -> None:
    needs(which or 0)
    # One output per scale, all 256 bytes, times the unit matrix: the weights come out as they are.
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    # The largest scales overflow for all but the smallest codes.
    blocks[:, 253:] &= 0x99
    packed = PackedWeights(blocks, torch.arange(255).to(torch.uint8)[None, :, None].repeat(1, 1, 16))
    weights = decoded(packed)[0].to(dtype)
    assert weights.isfinite().all()
    # AVX-512 BF16 takes what is below the smallest normal number for zero, as its inputs and its results.
    tiny = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0
    offsets = torch.tensor([512], dtype=torch.int32)
    for y in (
        native.forward(torch.eye(512, dtype=dtype), offsets, packed, instruction_set=which),
        native.backward(torch.eye(255, dtype=dtype), torch.tensor([255], dtype=torch.int32), packed).T,
    ):
        torch.testing.assert_close(y.double(), weights.double(), rtol=0, atol=tiny)
        large = weights.abs() >= tiny
        assert torch.equal(y[large], weights[large])


@pytest.mark.parametrize("backend", ["packed native", "packed reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_nan_is_honoured(dtype: torch.dtype, backend: str) -> None:
    problem = Problem("a hundred tokens", dtype)
    clean = differentiate(problem.run(backend), problem.inputs[:4], problem.d_out)
    problem.packed[0].scales[2, 5, 1] = 255
    hit = (problem.indices == 2).any(-1)
    assert hit.any()
    assert not hit.all()
    out, d_x, *_ = differentiate(problem.run(backend), problem.inputs[:4], problem.d_out)
    assert out[hit].isnan().all()
    assert torch.equal(out[~hit], clean[0][~hit])
    assert d_x[hit].isnan().any(-1).all()
    assert torch.equal(d_x[~hit], clean[1][~hit])


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_a_nan_stays_with_its_token(backend: str, dtype: torch.dtype) -> None:
    problem = Problem("a hundred tokens", dtype)
    clean = problem.run(backend)(*problem.inputs)
    problem.inputs[0][4, 3] = math.nan
    out = problem.run(backend)(*problem.inputs)
    assert out[4].isnan().all()
    assert torch.equal(out[5:], clean[5:])
    assert torch.equal(out[:4], clean[:4])


# The activation.


def plain_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate / (1 + torch.exp(-ALPHA * gate))


KERNELS = {"native": native, "reference": reference}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradient(dtype: torch.dtype, kernel: str) -> None:
    eps = torch.finfo(dtype).eps
    gate_up = torch.cat((torch.randn(40, 300) * 6, torch.linspace(-60, 60, 3000).view(10, 300).flip(1))).to(dtype)
    d_out = torch.randn(50, 150).to(dtype)
    exact, d_exact = differentiate(lambda x: plain_swiglu(x, LIMIT), [gate_up.double()], d_out.double())
    out = KERNELS[kernel].swiglu(gate_up, ALPHA, LIMIT)
    d_gate_up = KERNELS[kernel].swiglu_backward(d_out, gate_up, ALPHA, LIMIT)
    assert (out.dtype, d_gate_up.dtype) == (dtype, dtype)
    # The native one is in float32 inside; plain torch rounds at every step.
    scale = 10 if kernel == "native" else 30
    torch.testing.assert_close(out.double(), exact, rtol=scale * eps, atol=scale * eps * 1e-2)
    torch.testing.assert_close(d_gate_up.double(), d_exact, rtol=scale * eps, atol=scale * eps)
    # Negative controls: gate and up are not alike, and the limit is where it is.
    assert relative(plain_swiglu(gate_up.double().unflatten(-1, (-1, 2)).flip(-1).flatten(-2), LIMIT), exact) > 0.1
    assert relative(plain_swiglu(gate_up.double(), 6.9), exact) > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_at_the_limits(dtype: torch.dtype, kernel: str) -> None:
    above, below = (torch.tensor(LIMIT).to(dtype).nextafter(torch.tensor(to).to(dtype)) for to in (100.0, 0.0))
    edges = [0.0, -0.0, 1.0, LIMIT, above.item(), below.item(), 100.0, math.inf]
    edges += [-LIMIT, -above.item(), -below.item(), -100.0, -1e30]
    ups = [*edges, -math.inf]
    pairs = torch.tensor([[gate, up] for gate in edges for up in ups]).to(dtype)
    d_out = torch.ones(len(pairs), 1, dtype=dtype)
    exact, d_exact = differentiate(lambda x: plain_swiglu(x, LIMIT), [pairs.double()], d_out.double())
    out = KERNELS[kernel].swiglu(pairs, ALPHA, LIMIT)
    d_pairs = KERNELS[kernel].swiglu_backward(d_out, pairs, ALPHA, LIMIT)
    tolerance = 30 * torch.finfo(dtype).eps
    finite = exact.isfinite()
    torch.testing.assert_close(out.double()[finite], exact[finite], rtol=tolerance, atol=tolerance)
    # Where exactly a clamp holds there is no gradient; at the limit itself there is one where torch has one.
    gates, values = pairs[:, 0], pairs[:, 1]
    assert (d_pairs[gates > LIMIT, 0] == 0).all()
    assert (d_pairs[values.abs() > LIMIT, 1] == 0).all()
    assert ((d_pairs[(gates == LIMIT) & (values > 0), 0] > 0) == passes_at_limits()).all()
    assert ((d_pairs[(gates == LIMIT) & (values.abs() == LIMIT), 1] > 0) == passes_at_limits()).all()
    assert (d_pairs[(gates == below.item()) & (values > 0), 0] > 0).all()
    usual = gates > -1e29
    torch.testing.assert_close(d_pairs.double()[usual], d_exact[usual], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_lets_nan_through(dtype: torch.dtype, kernel: str) -> None:
    # Wide enough that compilers' vectors and what is left of them both see one.
    gate_up = torch.randn(3, 74)
    gate_up[0, 10], gate_up[1, 73], gate_up[2, 0] = math.nan, math.nan, math.nan
    found = KERNELS[kernel].swiglu(gate_up.to(dtype), ALPHA, LIMIT).isnan()
    assert found.nonzero().tolist() == [[0, 5], [1, 36], [2, 0]]
    d_out = torch.ones(3, 37)
    d_out[0, 20] = math.nan
    d_gate_up = KERNELS[kernel].swiglu_backward(
        d_out.to(dtype), torch.randn(3, 74).to(dtype).clamp(-3, 3), ALPHA, LIMIT
    )
    assert d_gate_up.isnan().nonzero().tolist() == [[0, 40], [0, 41]]


# Operators.


def operands(name: str) -> tuple[Any, ...]:
    size = (3, 6, 2)
    blocks, scales = (
        torch.randint(256, (*size, 16), dtype=torch.uint8),
        torch.randint(118, 130, size, dtype=torch.uint8),
    )
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, d_y = torch.randn(7, 64), torch.randn(7, 6)
    return {
        "expert_linear": (x.requires_grad_(), offsets, blocks, scales, torch.randn(3, 6, requires_grad=True)),
        "expert_linear_input_gradient": (d_y, offsets, blocks, scales),
        "clamped_swiglu": (torch.randn(5, 8, requires_grad=True), ALPHA, LIMIT),
        "clamped_swiglu_backward": (torch.randn(5, 4), torch.randn(5, 8), ALPHA, LIMIT),
    }[name]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "name", ["expert_linear", "expert_linear_input_gradient", "clamped_swiglu", "clamped_swiglu_backward"]
)
# torch's own, from 2.14 on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(name: str, backend: str) -> None:
    op = getattr(torch.ops.gptoss_opt, name).default
    torch.library.opcheck(op, (*operands(name), backend))


# The dense reference looks at the routes as it goes.
TRACED = [(name, dtype) for name, dtype in EACH if name != "dense reference"]


# torch's own, while tracing.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("backend", "dtype"), TRACED)
def test_compiles_without_a_graph_break(backend: str, dtype: torch.dtype) -> None:
    problem = Problem("every expert", dtype)
    run, given = problem.run(backend), problem.given(backend)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    pairs = zip(differentiate(compiled, given, problem.d_out), differentiate(run, given, problem.d_out), strict=True)
    for a, b in pairs:
        assert relative(a, b) < (1e-6 if dtype == torch.float32 else 1e-2)
    with torch.no_grad():
        assert relative(compiled(*given), run(*given)) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("backend", ["native", "torch"])
# torch's own, from 2.14 on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck_of_dense_weights(backend: str) -> None:
    dtype = torch.bfloat16 if backend == "native" else torch.float32
    if backend == "native" and native_dense.why_not(ExpertsRequest("cpu", dtype, (32, 64))):
        pytest.skip("this CPU has no AVX-512 BF16")
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, d_y, weight, bias = (torch.randn(size).to(dtype) for size in ((7, 64), (7, 32), (3, 64, 32), (3, 32)))
    x, weight, bias = (one.requires_grad_() for one in (x, weight, bias))
    ops = torch.ops.gptoss_opt
    torch.library.opcheck(ops.expert_linear.default, (x, offsets, weight, None, bias, backend))
    torch.library.opcheck(
        torch.ops.gptoss_opt.expert_linear_input_gradient.default, (d_y, offsets, weight.detach(), None, backend)
    )
    torch.library.opcheck(ops.expert_linear_weight_gradient.default, (d_y, offsets, x.detach(), 3))


def largest_saved(run: Callable[..., Tensor], given: list[Tensor]) -> int:
    """The number of elements of the largest floating point tensor that is kept for the backward pass."""
    sizes = [0]

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            sizes.append(tensor.numel())
        return tensor

    leaves = [x.detach().requires_grad_() for x in given]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(*leaves).sum()
    return max(sizes)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    problem = Problem("one token")
    num_experts, hidden, inner, tokens, top_k = SHAPES["one token"]
    for backend in ("packed native", "packed reference"):
        assert largest_saved(problem.run(backend), problem.inputs[:4]) <= tokens * top_k * 2 * inner
    # Negative control: dense weights are kept, all of them.
    assert largest_saved(problem.run("dense torch"), problem.inputs) == num_experts * hidden * 2 * inner


def test_packed_weights_take_no_gradient_and_need_none() -> None:
    problem = Problem("every expert")
    x = problem.inputs[0].clone().requires_grad_()
    problem.run("packed native")(x, *problem.inputs[1:]).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        assert problem.run("packed native")(*problem.inputs).is_inference()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    problem = Problem("every expert")
    run, exact = problem.run(backend), problem.truth()

    def cast(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert (inputs[0] @ inputs[0].T).dtype == torch.bfloat16
            return run(*inputs)

    ours, plain = differentiate(cast, problem.given(backend), problem.d_out), cast(*problem.inputs)
    assert ours[0].dtype == plain.dtype == torch.float32
    assert relative(plain, exact[0]) < 1e-5
    for name, actual, wanted in zip(NAMES, ours, exact, strict=False):
        assert relative(actual, wanted) < 1e-5, name


def test_tracing_without_a_compiler() -> None:
    problem = Problem("every expert")
    run = problem.run("packed native")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: run(x, *problem.inputs[1:]), problem.inputs[0])
        # Not the input that it was traced with.
        x = problem.inputs[0] + 1
        assert relative(traced(x), run(x, *problem.inputs[1:])) < 1e-6


def test_tensors_without_memory() -> None:
    problem = Problem("every expert")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = mode.from_tensor(problem.inputs[0])
        assert problem.run("packed native")(fake, *problem.inputs[1:]).shape == fake.shape
        assert problem.run("dense torch")(fake, *problem.inputs[1:]).shape == fake.shape


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_shapes_that_do_not_fit_are_refused_before_any_memory_is_touched(kind: str) -> None:
    dtype = torch.float32 if kind == "packed" else torch.bfloat16
    if kind == "dense" and native_dense.why_not(ExpertsRequest("cpu", dtype, (32, 64))):
        pytest.skip("this CPU has no AVX-512 BF16")
    problem = Problem("a hundred tokens", dtype)
    x, routing_weights, _, _, *dense = problem.inputs
    weights = problem.packed if kind == "packed" else [DenseWeights(w) for w in dense]
    wrong: dict[str, tuple[Any, ...]] = {
        "indices is [7, 2], and should be [100, 2]": (x, problem.indices[:7], routing_weights, *weights),
        "routing_weights is [7, 2], and should be [100, 2]": (x, problem.indices, routing_weights[:7], *weights),
        "x is [100, 64], and should be [100, 96]": (x[:, :64], problem.indices, routing_weights, *weights),
        "down is [4, 96, 64], and should be [4, 32, 96]": (x, problem.indices, routing_weights, weights[0], weights[0]),
    }
    for message, args in wrong.items():
        with pytest.raises(ValueError, match=re.escape(message)), torch.no_grad():
            native.fused(*args, ALPHA, LIMIT)
    if kind == "packed":
        with pytest.raises(ValueError, match=re.escape("rows is [3, 64], and should be [3, 96]")):
            native.forward(torch.randn(3, 64), torch.tensor([1, 2, 3, 3], dtype=torch.int32), problem.packed[0])
        with pytest.raises(ValueError, match=re.escape("offsets is [3], and should be [4]")):
            native.forward(torch.randn(3, 96), torch.tensor([1, 2, 3], dtype=torch.int32), problem.packed[0])


@pytest.mark.parametrize("grad", [False, True])
def test_dense_weights_cast_after_wrapping_are_refused(grad: bool) -> None:
    if native_dense.why_not(ExpertsRequest("cpu", torch.bfloat16, (32, 64))):
        pytest.skip("this CPU has no AVX-512 BF16")
    problem = Problem("every expert")
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"takes torch\.bfloat16 weights on cpu"):
        problem.run("dense native")(problem.inputs[0].requires_grad_(grad), *problem.inputs[1:])


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_calls_of_many_sizes_at_once_keep_out_of_each_others_memory() -> None:
    needs(0)
    problem = Problem("a hundred tokens", torch.float32)
    sizes = [1, 100, 3, 60, 100, 2, 31, 99] * 5

    def some(size: int) -> Tensor:
        rows = slice(0, size)
        x, indices, weights = problem.inputs[0][rows], problem.indices[rows], problem.inputs[1][rows]
        return native.fused(x, indices, weights, *problem.packed, ALPHA, LIMIT)

    expected = {size: some(size) for size in sizes}
    with ThreadPoolExecutor(4) as pool:
        for size, found in zip(sizes, pool.map(some, sizes), strict=True):
            assert torch.equal(found, expected[size])
    # Negative control: rows differ, so that those of another call would be noticed.
    assert len(expected[100].unique(dim=0)) > 90


def test_scratch_memory_goes_with_its_thread() -> None:
    packed = PackedWeights(
        torch.zeros(1, 64, 256, 16, dtype=torch.uint8), torch.full((1, 64, 256), 127, dtype=torch.uint8)
    )
    x, offsets = torch.randn(40, 8192), torch.tensor([40], dtype=torch.int32)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    def calls(number: int) -> None:
        for _ in range(number):
            thread = threading.Thread(target=lambda: native.forward(x, offsets, packed))
            thread.start()
            thread.join()

    calls(20)
    before = resident()
    calls(200)
    # Each would leave 128 KiB behind.
    assert resident() - before < 8 * 1024


# The library itself.


def test_explain_says_which_instructions_compute_and_why_not_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    needs(0)
    real = native_library.library()
    for best, name in enumerate(native_library.INSTRUCTION_SETS):
        monkeypatch.setattr(native_library, "library", lambda best=best: real._replace(best=best))
        monkeypatch.setattr(native_library, "has", lambda flag: False)
        assert native_library.computes_on() == name
        monkeypatch.setattr(native_library, "has", lambda flag: flag == "amx_bf16")
        assert ("Linux refused" in native_library.computes_on()) == (name != "AMX")
    row = explain(with_mxfp4_experts(tiny_model())).rows[0]
    assert any(
        line.startswith("experts: by the native library, on AMX; packed experts: native") for line in row.changed
    )


def test_a_library_that_cannot_be_loaded_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"junk")
    for path, reason in ((tmp_path / "none.so", "was not built when"), (broken, "could not be loaded")):
        monkeypatch.setattr(native_library, "FILE", path)
        native_library._loaded.cache_clear()
        assert reason in str(native_library.why_not("cpu", torch.float32))
        blocks, scales = pack(torch.ones(32))
        assert (blocks.unique().tolist(), scales.tolist()) == ([0x66], [125])
    monkeypatch.undo()
    native_library._loaded.cache_clear()
    assert native_library.why_not("cpu", torch.float32) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is looked for in /proc")
def test_the_runtime_of_torch_is_found_in_a_folder_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def load(path: str) -> Any:
        opened.append(path)
        if "old" in path:
            raise OSError("gone")
        return types.SimpleNamespace(GOMP_parallel=ctypes.c_void_p(1))

    lines = [
        "7f00-7f01 r-xp 00000000 fe:00 12 " + name for name in ("/an old place/libgomp.so.1", "/my env/libgomp.so.1")
    ]
    monkeypatch.setattr(Path, "read_text", lambda self: "\n".join([*lines, "7f02-7f03 rw-p 00000000 00:00 0"]))
    monkeypatch.setattr(native_library.ctypes, "CDLL", load)
    assert native_library._fork_join() is not None
    assert opened == ["/an old place/libgomp.so.1", "/my env/libgomp.so.1"]


# Routes.


def test_routes_are_sorted_and_stable() -> None:
    indices = torch.tensor([[2, 0], [0, 5], [2, 2], [-1, 1]])
    routes = Routes.of(indices, 3)
    # Routes are numbered token by token: 0 1 | 2 3 | 4 5 | 6 7.
    assert routes.order.tolist() == [1, 2, 7, 0, 4, 5, 3, 6]
    assert routes.offsets.tolist() == [2, 3, 6]
    assert routes.offsets.dtype == torch.int32
    assert routes.order[routes.inverse].tolist() == list(range(8))
    assert routes.top_k == 2
    x = torch.arange(4.0)[:, None]
    assert routes.gather(x)[:, 0].tolist() == [0, 1, 3, 0, 2, 2, 1, 3]
    assert Routes.of(torch.zeros(0, 4, dtype=torch.long), 5).offsets.tolist() == [0] * 5


def test_combine_is_the_weighted_sum_of_gathered_rows() -> None:
    indices, weights = torch.randint(0, 5, (40, 3)), torch.rand(40, 3, dtype=torch.float64)
    routes = Routes.of(indices, 5)
    x = torch.randn(40, 6, dtype=torch.float64)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        return routes.combine(routes.gather(x) * 2, weights)

    d_out = torch.randn_like(x)
    expected = differentiate(lambda x, w: 2 * x * w.sum(-1, keepdim=True), [x, weights], d_out)
    for a, b in zip(differentiate(run, [x, weights], d_out), expected, strict=True):
        torch.testing.assert_close(a, b)
    # One order of summation, whatever the experts: the same rows in another order give the same bits.
    y = torch.randn(40, 3, 6)
    a, b = (
        other.combine(y.flatten(0, 1)[other.order], weights.float())
        for other in (routes, Routes.of(torch.randint(0, 5, (40, 3)), 5))
    )
    assert torch.equal(a, b)
    assert relative(a, (y * weights[..., None]).sum(1)) < 1e-6


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.float32, "is for CPUs, and the model is on cuda"),
        ("cpu", torch.float64, "takes torch.bfloat16 and torch.float32, and the model is in torch.float64"),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_where_the_native_library_serves(device: str, dtype: torch.dtype, reason: str | None) -> None:
    assert native_library.why_not(device, dtype) == reason


def test_where_the_others_serve() -> None:
    torch_grouped, reference = (next(b for b in DENSE_BACKENDS if b.name == name) for name in ("torch", "reference"))
    assert torch_grouped.why_not(ExpertsRequest("cpu", torch.float32)) is None
    assert "grouped_mm has no kernel on mps" in str(torch_grouped.why_not(ExpertsRequest("mps", torch.float32)))
    assert "float64" in str(torch_grouped.why_not(ExpertsRequest("cpu", torch.float64)))
    assert "float16 on cuda" in str(torch_grouped.why_not(ExpertsRequest("cuda", torch.float16)))
    odd = torch_grouped.why_not(ExpertsRequest("cpu", torch.bfloat16, (64, 60)))
    assert odd == "grouped_mm takes rows of a multiple of 16 bytes, not of 60 values in torch.bfloat16"
    assert torch_grouped.why_not(ExpertsRequest("cpu", torch.float32, (64, 60))) is None
    assert reference.why_not(ExpertsRequest("anything", torch.float64)) is None
