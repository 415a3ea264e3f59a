"""Low-rank changes compute what changed weights would, forward and backward, and never make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptoss_opt.kernels import low_rank as changes_of_any_weight
from gptoss_opt.kernels import native
from gptoss_opt.kernels.experts import DenseWeights, PackedWeights, experts
from gptoss_opt.kernels.experts import low_rank as changes_of_experts
from gptoss_opt.kernels.experts.low_rank import changed_linear
from gptoss_opt.kernels.low_rank import LowRank, dropped
from gptoss_opt.kernels.mxfp4 import pack
from gptoss_opt.kernels.native.low_rank import add_from_rank, serves, sums_over_rows, to_rank
from tests.helpers import assert_as_exact, differentiate, relative
from tests.kernels.test_experts import ALPHA, LIMIT, SHAPES, Problem, backends, truth

DTYPES = (torch.float32, torch.bfloat16)
SETS = range(len(native.INSTRUCTION_SETS))
EACH = [(backend, dtype) for dtype in DTYPES for backend in backends(dtype)]
SCALE = 0.7
NAMES = ("out", "dx", "d_routing", "d_gate_up_A", "d_gate_up_B", "d_down_A", "d_down_B")
BIASES = ("d_gate_up_bias", "d_down_bias", "d_gate_up", "d_down")


# The three products of the native library.


@pytest.fixture(params=SETS, ids=lambda number: native.INSTRUCTION_SETS[number])
def which(request: pytest.FixtureRequest) -> int:
    if request.param > native.library().best:
        pytest.skip(f"this CPU has no {native.INSTRUCTION_SETS[request.param]}")
    return request.param


def experts_of(offsets: list[int]) -> list[tuple[int, slice]]:
    return [(e, slice(begin, end)) for e, (begin, end) in enumerate(zip([0, *offsets], offsets, strict=False))]


OFFSETS = {
    "one row": [1],
    "odd counts": [5, 5, 12, 43],
    "the first and the last without rows": [0, 33, 70, 70],
    "more than a block in one": [0, 0, 97],
    "none at all": [0, 0, 0],
}


@pytest.mark.parametrize("length", [16, 48, 64, 272])
@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_products(dtype: torch.dtype, kind: str, length: int, which: int) -> None:
    for rank in (1, 2, 3, 4, 5, 8, 31, 33):
        are_exact(dtype, OFFSETS[kind], length, rank, which)


def are_exact(dtype: torch.dtype, offsets: list[int], length: int, rank: int, which: int) -> None:
    num_experts = len(offsets)
    rows = torch.randn(offsets[-1] + 7, length).to(dtype)  # the last seven are of no expert
    factor, hidden = torch.randn(num_experts, rank, length), torch.randn(len(rows), rank)
    given = torch.tensor(offsets, dtype=torch.int32)
    exact_hidden, exact_rows = torch.zeros(len(rows), rank).double(), rows.double()
    exact_sums = torch.zeros(num_experts, rank, length).double()
    for e, some in experts_of(offsets):
        exact_hidden[some] = rows[some].double() @ factor[e].double().T
        exact_rows[some] += hidden[some].double() @ factor[e].double()
        exact_sums[e] = hidden[some].double().T @ rows[some].double()

    found = to_rank(rows, given, factor, instruction_set=which)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact_hidden, rtol=1e-5, atol=1e-4)
    assert not found[offsets[-1] :].any()
    sums = sums_over_rows(hidden, rows, given, num_experts, instruction_set=which)
    torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-5, atol=1e-4)
    added = rows.clone()
    add_from_rank(added, given, hidden, factor, instruction_set=which)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(added.double(), exact_rows, rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(added[offsets[-1] :], rows[offsets[-1] :])
    # Negative control: another expert's factor gives something else.
    if offsets[-1] and num_experts > 1:
        assert relative(to_rank(rows, given, factor.roll(1, 0), instruction_set=which), exact_hidden) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_products_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    rows, factor = torch.randn(300, 320).to(dtype), torch.randn(5, 8, 320)
    offsets, hidden = torch.tensor([90, 90, 170, 171, 260], dtype=torch.int32), torch.randn(300, 8)

    def all_of_them() -> list[Tensor]:
        added = rows.clone()
        add_from_rank(added, offsets, hidden, factor)
        return [to_rank(rows, offsets, factor), sums_over_rows(hidden, rows, offsets, 5), added]

    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(all_of_them())
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_native_products_take_strided_tensors_and_refuse_what_does_not_fit() -> None:
    offsets, factor, rows = torch.tensor([3, 5], dtype=torch.int32), torch.randn(2, 4, 32), torch.randn(6, 32)
    strided = torch.stack((rows, rows), -1)[..., 0]
    assert torch.equal(to_rank(strided, offsets, factor), to_rank(rows, offsets, factor))
    turned = factor.mT.contiguous().mT
    assert torch.equal(to_rank(rows, offsets, turned), to_rank(rows, offsets, factor))
    with pytest.raises(ValueError, match="rows is not contiguous"):
        add_from_rank(strided, offsets, torch.randn(6, 4), factor)
    with pytest.raises(ValueError, match=r"factor is \[3, 4, 32\], and should be \[2, 4, 32\]"):
        to_rank(rows, offsets, torch.randn(3, 4, 32))
    with pytest.raises(ValueError, match=r"hidden is \[5, 4\], and should be \[6, 4\]"):
        add_from_rank(rows, offsets, torch.randn(5, 4), factor)
    with pytest.raises(ValueError, match="offsets is torch.int64"):
        to_rank(rows, offsets.long(), factor)


def test_what_the_native_library_serves() -> None:
    assert serves(torch.empty(1, dtype=torch.bfloat16), 16, 64)
    assert serves(torch.empty(1), 32)
    assert not serves(torch.empty(1), 16, 20)
    assert not serves(torch.empty(1, dtype=torch.float64), 16)
    assert not serves(torch.empty(1, device="meta"), 16)


# A change of any one weight.


SIZES = {"odd": (12, 7), "multiples of 16": (48, 32)}
"""Of the input and the output: what the native library does not take, and what it does."""


def given(sizes: tuple[int, int], rows: tuple[int, ...], dtype: torch.dtype, of_factors: torch.dtype) -> list[Tensor]:
    """y, x, A and B."""
    num_in, num_out = sizes
    y, x = torch.randn(*rows, num_out).to(dtype), torch.randn(*rows, num_in).to(dtype)
    return [y, x, torch.randn(3, num_in).to(of_factors), torch.randn(num_out, 3).to(of_factors)]


def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return LowRank(a, b, SCALE).added_to(y, x)


def added_exactly(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return y + x @ (SCALE * b @ a).T


@pytest.mark.parametrize("of_factors", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_added_to_a_product(
    sizes: tuple[int, int], rows: tuple[int, ...], dtype: torch.dtype, of_factors: torch.dtype
) -> None:
    inputs = given(sizes, rows, dtype, of_factors)
    d_out = torch.randn(*rows, sizes[1]).to(dtype)
    found = differentiate(added, inputs, d_out)
    exact = differentiate(added_exactly, [one.double() for one in inputs], d_out.double())
    # Factors in bfloat16 have gradients in bfloat16.
    eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float64 else 0)
    for number, (actual, wanted) in enumerate(zip(found, exact, strict=True)):
        own = torch.finfo(of_factors).eps if number > 2 else 0
        assert actual.dtype == (of_factors if number > 2 else dtype)
        assert actual.shape == wanted.shape
        assert relative(actual, wanted) < 6 * max(eps, own), number
    assert found[0].numel() == 0 or relative(inputs[0], exact[0]) > 0.1


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_added_to_a_product_of_another_layout_and_dtype(sizes: tuple[int, int]) -> None:
    y, x, a, b = given(sizes, (4, 6), torch.float32, torch.float32)
    before = y.clone()
    expected = added(y, x, a, b)
    assert torch.equal(y, before), "what is given stays"
    turned = added(y.transpose(0, 1).contiguous().transpose(0, 1), torch.stack((x, x), -1)[..., 0], a, b)
    assert relative(turned, expected) < 1e-6
    assert relative(added(y, x, a.T.contiguous().T, b.T.contiguous().T), expected) < 1e-6
    # What autocast makes: the input in float32, the product in bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        mixed = differentiate(lambda x, a, b: added(y.bfloat16(), x, a, b), [x, a, b], torch.randn(4, 6, sizes[1]))
    assert mixed[0].dtype == torch.bfloat16
    assert relative(mixed[0], expected) < 1e-2
    assert all(gradient.dtype == torch.float32 for gradient in mixed[1:])


@pytest.mark.parametrize("taking", [(0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_second_derivatives_of_what_is_added(sizes: tuple[int, int], taking: tuple[int, ...]) -> None:
    inputs = given(sizes, (5,), torch.float32, torch.float32)

    def run(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        def of_some(*some: Tensor) -> Tensor:
            full = list(inputs)
            for place, one in zip(taking, some, strict=True):
                full[place] = one
            return function(*full)

        return [
            *differentiate(of_some, [inputs[n] for n in taking], inputs[0]),
            *second(of_some, [inputs[n] for n in taking]),
        ]

    exact = run(added_exactly, [one.double() for one in inputs])
    for actual, wanted in zip(run(added, inputs), exact, strict=True):
        assert relative(actual, wanted) < 1e-5


def test_the_change_itself() -> None:
    a, b = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 5, 3, dtype=torch.bfloat16)
    change = LowRank(a, b, SCALE)
    assert (change.delta().dtype, change.delta().shape) == (torch.float32, (2, 5, 8))
    torch.testing.assert_close(change.delta(), SCALE * (b.float() @ a.float()), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(change.expert(1).delta(), change.delta()[1])
    assert LowRank(a.double(), b.double()).delta().dtype == torch.float64


# Changes of the experts' weights.


class Changed(Problem):
    """A problem whose both projections have a change. Inputs more: A and B of the first, A and B of the second."""

    def __init__(self, shape: str, dtype: torch.dtype = torch.float32, rank: int = 3, **options: Any) -> None:
        super().__init__(shape, dtype, **options)
        num_experts, hidden, inner, *_ = SHAPES[shape]
        for num_in, num_out in ((hidden, 2 * inner), (inner, hidden)):
            first = torch.randn(num_experts, rank, num_in) / num_in**0.5
            self.inputs += [first.to(dtype), torch.randn(num_experts, num_out, rank).to(dtype) / rank**0.5]

    @property
    def factors(self) -> list[Tensor]:
        return self.inputs[6:]

    def frozen(self, backend: str, dropout: float = 0.0) -> Callable[..., Tensor]:
        """Of x, routing weights and factors: the base is frozen, as with_lora leaves it."""
        return lambda x, w, *factors: self.call(backend, dropout)(x, w, *self.inputs[2:6], *factors)

    def call(self, backend: str, dropout: float = 0.0) -> Callable[..., Tensor]:
        kind, name = backend.split()

        def run(x: Tensor, w: Tensor, b1: Tensor, b2: Tensor, w1: Tensor, w2: Tensor, *factors: Tensor) -> Tensor:
            if kind == "packed":
                weights = [replace(packed, bias=bias) for packed, bias in zip(self.packed, (b1, b2), strict=True)]
            else:
                weights = [DenseWeights(w1, b1), DenseWeights(w2, b2)]
            changes = tuple(LowRank(*factors[n : n + 2], SCALE, dropout) for n in (0, 2))
            options = {"alpha": ALPHA, "limit": LIMIT, "backend": name, "changes": changes}
            return experts(x, self.indices, w, *weights, **options)

        return run

    def exact(self, *inputs: Tensor) -> Tensor:
        """Through the changed weights, which are made."""
        x, w, b1, b2, w1, w2, *factors = inputs
        changed = [w1, w2]
        for number in (0, 1):
            a, b = factors[2 * number : 2 * number + 2]
            changed[number] = changed[number] + SCALE * (b @ a).mT
        return truth(x, w, b1, b2, *changed, indices=self.indices)

    def expected(self) -> list[Tensor]:
        """The output, and the gradients of x, routing weights and factors, in float64."""
        doubles = [one.double() for one in self.inputs]
        run = lambda x, w, *factors: self.exact(x, w, *doubles[2:6], *factors)  # noqa: E731
        return differentiate(run, [*doubles[:2], *doubles[6:]], self.d_out.double())


def of_frozen(problem: Changed, backend: str) -> list[Tensor]:
    return differentiate(problem.frozen(backend), [*problem.inputs[:2], *problem.factors], problem.d_out)


@pytest.mark.parametrize("rank", [1, 3, 16, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(torch.float32))
def test_float32(backend: str, shape: str, rank: int) -> None:
    problem = Changed(shape, rank=rank)
    for name, actual, exact in zip(NAMES, of_frozen(problem, backend), problem.expected(), strict=True):
        assert (actual.dtype, actual.shape) == (torch.float32, exact.shape)
        assert relative(actual, exact) < 1e-5, name


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "no token"])
@pytest.mark.parametrize("backend", backends(torch.bfloat16))
def test_error_budget(backend: str, shape: str) -> None:
    problem = Changed(shape, torch.bfloat16)
    plain = differentiate(
        lambda x, w, *factors: problem.exact(x, w, *problem.inputs[2:6], *factors),
        [*problem.inputs[:2], *problem.factors],
        problem.d_out,
    )
    ours, exact = of_frozen(problem, backend), problem.expected()
    assert_as_exact(NAMES, ours, plain, exact)
    for name, actual, wanted in zip(NAMES, ours, exact, strict=True):
        cosine = torch.nn.functional.cosine_similarity(actual.double().flatten(), wanted.flatten(), dim=0)
        assert cosine >= 0.9999 or name == "d_routing", name


@pytest.mark.parametrize("backend", ["packed reference", "dense reference"])
def test_float64(backend: str) -> None:
    problem = Changed("a hundred tokens", torch.float64)
    for name, actual, exact in zip(NAMES, of_frozen(problem, backend), problem.expected(), strict=True):
        assert relative(actual, exact) < 1e-12, name


def test_float16() -> None:
    problem = Changed("a hundred tokens", torch.float16)
    for name, actual, exact in zip(NAMES, of_frozen(problem, "dense torch"), problem.expected(), strict=True):
        assert actual.dtype == torch.float16
        assert relative(actual, exact) < 5e-3, name


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_beside_weights_that_take_gradients(backend: str) -> None:
    problem = Changed("a hundred tokens")
    given = problem.inputs if backend.startswith("dense") else [*problem.inputs[:4], *problem.factors]

    def run(*inputs: Tensor) -> Tensor:
        frozen = () if backend.startswith("dense") else problem.inputs[4:6]
        return problem.call(backend)(*inputs[:4], *frozen, *inputs[4:])

    exact = differentiate(problem.exact, [one.double() for one in problem.inputs], problem.d_out.double())
    wanted = exact if backend.startswith("dense") else [*exact[:5], *exact[7:]]
    for number, (actual, right) in enumerate(zip(differentiate(run, given, problem.d_out), wanted, strict=True)):
        assert relative(actual, right) < 1e-5, number


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_one_projection_alone(backend: str) -> None:
    problem = Changed("a hundred tokens")
    for alone in (0, 1):
        factors = [one if number // 2 == alone else 0 * one for number, one in enumerate(problem.factors)]
        exact = problem.exact(*(one.double() for one in (*problem.inputs[:6], *factors)))
        kind, name = backend.split()
        weights = problem.packed if kind == "packed" else map(DenseWeights, problem.inputs[4:6])
        weights = [replace(one, bias=bias) for one, bias in zip(weights, problem.inputs[2:4], strict=True)]
        changes: list[LowRank | None] = [None, None]
        changes[alone] = LowRank(*problem.factors[2 * alone : 2 * alone + 2], SCALE)
        options = {"alpha": ALPHA, "limit": LIMIT, "backend": name}
        found = experts(*problem.inputs[:1], problem.indices, problem.inputs[1], *weights, changes=changes, **options)
        assert relative(found, exact) < 1e-5
        assert relative(found, problem.expected()[0]) > 1e-2


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_routes_to_no_expert_add_nothing(backend: str, dtype: torch.dtype) -> None:
    problem = Changed("a hundred tokens", dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    problem.indices[::3, 0] = -1
    problem.indices[1::3, 1] = 4
    problem.indices[2] = torch.tensor([1000, -1000])
    ours = of_frozen(problem, backend)
    for name, actual, exact in zip(NAMES, ours, problem.expected(), strict=True):
        assert relative(actual, exact) < tolerance, name
    assert not ours[0][2].any()
    problem.indices.fill_(-1)
    for actual in of_frozen(problem, backend):
        assert not actual.any()


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_mistakes_are_noticed(backend: str) -> None:
    problem = Changed("a hundred tokens")
    right, inputs = problem.expected()[0], [*problem.inputs[:2], *problem.factors]
    run = problem.frozen(backend)
    assert relative(run(*inputs), right) < 1e-5
    for number in range(2, 6):
        for wrong in (0 * inputs[number], inputs[number].roll(1, 0), 1.1 * inputs[number]):
            assert relative(run(*inputs[:number], wrong, *inputs[number + 1 :]), right) > 1e-2, number


LENGTHS = {"multiples of 16": (32, 48), "multiples of 8": (24, 40), "odd": (7, 13)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths_that_the_native_library_does_not_take(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    num_in, num_out = lengths
    weight, x = torch.randn(3, num_in, num_out).to(dtype), torch.randn(11, num_in).to(dtype)
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)
    a, b = torch.randn(3, 2, num_in), torch.randn(3, num_out, 2)

    def exact(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = torch.zeros(11, num_out, dtype=x.dtype)
        for e, some in experts_of(offsets.tolist()):
            y[some] = x[some] @ (weight[e].to(x.dtype) + SCALE * (b[e] @ a[e]).T)
        return y

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return changed_linear(x, offsets, DenseWeights(weight), LowRank(a, b, SCALE), "reference")

    d_y = torch.randn(11, num_out).to(dtype)
    found = differentiate(ours, [x, a, b], d_y)
    wanted = differentiate(exact, [x.double(), a.double(), b.double()], d_y.double())
    for actual, right in zip(found, wanted, strict=True):
        assert relative(actual, right) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert [one.dtype for one in found[2:]] == [a.dtype, b.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_and_without_the_native_library_alike(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Changed("a hundred tokens", dtype)
    first = of_frozen(problem, "packed native")
    called = []
    monkeypatch.setattr(changes_of_experts, "serves", lambda *_: called.append(1))
    for name, one, other in zip(NAMES, first, of_frozen(problem, "packed native"), strict=True):
        assert relative(one, other) < (1e-5 if dtype == torch.float32 else 2e-2), name
    assert len(called) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_any_dtype(dtype: torch.dtype) -> None:
    problem = Changed("a hundred tokens")
    factors = [one.to(dtype) for one in problem.factors]
    exact = differentiate(
        lambda *f: problem.exact(*(one.double() for one in problem.inputs[:6]), *f),
        [one.double() for one in factors],
        problem.d_out.double(),
    )
    run = problem.frozen("packed native")
    found = differentiate(lambda *f: run(*problem.inputs[:2], *f), factors, problem.d_out)
    assert relative(found[0], exact[0]) < 1e-5
    for name, actual, right in zip(NAMES[3:], found[1:], exact[1:], strict=True):
        assert actual.dtype == dtype
        assert relative(actual, right) < max(1e-5, torch.finfo(dtype).eps), name


def test_factors_that_do_not_fit_are_named() -> None:
    problem = Changed("a hundred tokens")
    inputs = [*problem.inputs[:2], *problem.factors]
    inputs[4] = inputs[4][..., :-1]
    with pytest.raises(ValueError, match=r"down_proj_lora_A .*\[4, 3, 31\]"):
        problem.frozen("packed native")(*inputs)
    inputs[4] = problem.factors[2]
    inputs[3] = inputs[3][:3]
    with pytest.raises(ValueError, match=r"gate_up_proj_lora_B .*\[3, 64, 3\]"):
        problem.frozen("dense torch")(*inputs)


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_inference_is_what_training_computes(backend: str) -> None:
    problem = Changed("a hundred tokens")
    inputs = [*problem.inputs[:2], *problem.factors]
    expected = problem.frozen(backend)(*(one.clone().requires_grad_() for one in inputs))
    with torch.no_grad():
        assert torch.equal(problem.frozen(backend)(*inputs), expected)
    with torch.inference_mode():
        assert torch.equal(problem.frozen(backend)(*inputs), expected)


# Derivatives of derivatives, transforms, compilation.


def second(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    first = torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=True)
    return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))


@pytest.mark.parametrize("backend", [one for one in backends(torch.float32) if one != "packed reference"])
def test_second_derivatives(backend: str) -> None:
    problem = Changed("every expert")
    inputs = [*problem.inputs[:2], *problem.factors]
    found = second(problem.frozen(backend), inputs)
    doubles = [one.double() for one in problem.inputs]
    exact = second(lambda x, w, *f: problem.exact(x, w, *doubles[2:6], *f), [one.double() for one in inputs])
    for name, actual, right in zip(NAMES[1:], found, exact, strict=True):
        assert relative(actual, right) < 1e-4, name


def test_second_derivatives_where_only_some_take_gradients() -> None:
    problem = Changed("every expert")
    doubles = [one.double() for one in problem.inputs]
    for taking in ([0], [2], [3], [3, 5], [0, 4]):

        def some(run: Callable[..., Tensor], inputs: list[Tensor], taking: list[int] = taking) -> list[Tensor]:
            def of_some(*given: Tensor) -> Tensor:
                full = list(inputs)
                for place, one in zip(taking, given, strict=True):
                    full[place] = one
                return run(*full)

            return second(of_some, [inputs[place] for place in taking])

        inputs = [*problem.inputs[:2], *problem.factors]
        found = some(problem.frozen("packed native"), inputs)
        exact = some(lambda x, w, *f: problem.exact(x, w, *doubles[2:6], *f), [one.double() for one in inputs])
        for actual, right in zip(found, exact, strict=True):
            assert relative(actual, right) < 1e-4, taking


# Those of torch itself, under vmap and in forward mode.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_func() -> None:
    problem = Changed("every expert")
    inputs = [*problem.inputs[:2], *problem.factors]
    for backend in ("packed reference", "dense reference"):
        run = problem.frozen(backend)
        loss = lambda *given, run=run: (run(*given) * problem.d_out).sum()  # noqa: E731
        found = torch.func.grad(loss, argnums=tuple(range(6)))(*inputs)
        for name, actual, right in zip(NAMES[1:], found, problem.expected()[1:], strict=True):
            assert relative(actual, right) < 1e-5, name
        tangents = tuple(torch.randn_like(one) for one in inputs)
        _, ahead = torch.func.jvp(run, tuple(inputs), tangents)
        pushed = sum((grad * tangent).sum() for grad, tangent in zip(found, tangents, strict=True))
        assert relative((ahead * problem.d_out).sum(), pushed) < 1e-4
        one_by_one = torch.func.vmap(run, in_dims=(None, None, 0, None, None, None))
        twice = torch.stack([problem.factors[0], 2 * problem.factors[0]])
        batched = one_by_one(*inputs[:2], twice, *inputs[3:])
        assert relative(batched[1], run(*inputs[:2], twice[1], *inputs[3:])) < 1e-5
        assert relative(batched[0], batched[1]) > 1e-2
    with pytest.raises(ValueError, match="only backend='reference'"):
        torch.func.grad(lambda x: problem.frozen("packed native")(x, *inputs[1:]).sum())(inputs[0])


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_compiles(backend: str, dtype: torch.dtype) -> None:
    problem = Changed("a hundred tokens", dtype)
    torch._dynamo.reset()
    compiled = torch.compile(problem.frozen(backend), backend="aot_eager")
    inputs = [*problem.inputs[:2], *problem.factors]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, actual, exact in zip(
        NAMES, differentiate(compiled, inputs, problem.d_out), problem.expected(), strict=True
    ):
        assert relative(actual, exact) < tolerance, name


# Dropout.


def test_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    x = torch.full((2000, 100), 3.0)
    y = dropped(x, 0.3)
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 3 / 0.7))
    assert float(y.mean()) == pytest.approx(3, rel=0.01)
    # No row and no column is left out as a whole.
    assert float((y == 0).float().mean(0).std()) < 0.03
    assert dropped(x, 0.0) is x


def test_dropout_draws_one_number_a_call_whatever_the_rows() -> None:
    states = []
    for rows in (1, 40, 0):
        torch.manual_seed(5)
        dropped(torch.ones(rows, 8), 0.5)
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)
    first, again = dropped(torch.ones(40, 8), 0.5), dropped(torch.ones(40, 8), 0.5)
    assert not torch.equal(first, again)
    torch.manual_seed(7)
    one = dropped(torch.ones(40, 8), 0.5)
    torch.manual_seed(7)
    assert torch.equal(dropped(torch.ones(40, 8), 0.5), one)


@contextmanager
def kept_masks() -> Iterator[list[Tensor]]:
    """Meanwhile, what `dropped` keeps is noted: 0 or 1 / (1 - p) for each value."""
    masks: list[Tensor] = []
    real = changes_of_any_weight.dropped

    def noting(x: Tensor, probability: float) -> Tensor:
        masks.append(real(torch.ones_like(x), probability))
        return x * masks[-1]

    changes_of_experts.dropped = noting
    try:
        yield masks
    finally:
        changes_of_experts.dropped = real


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_dropout_is_exact_in_the_change_alone(backend: str) -> None:
    problem = Changed("every expert")
    inputs, dropout = [*problem.inputs[:2], *problem.factors], 0.4
    with kept_masks() as masks:
        torch.manual_seed(11)
        found = differentiate(problem.frozen(backend, dropout), inputs, problem.d_out)
    assert len(masks) == 2
    torch.manual_seed(11)
    plain = differentiate(problem.frozen(backend, dropout), inputs, problem.d_out)
    assert all(relative(one, other) < 1e-6 for one, other in zip(found, plain, strict=True))

    def exact(x: Tensor, w: Tensor, *factors: Tensor) -> Tensor:
        """Route by route, with the masks in the order in which rows are computed: sorted by expert."""
        b1, b2, w1, w2 = (one.double() for one in problem.inputs[2:6])
        order = problem.indices.reshape(-1).sort(stable=True).indices.tolist()
        out = torch.zeros_like(x)
        for row, route in enumerate(order):
            token, place = divmod(route, problem.indices.shape[1])
            e = int(problem.indices[token, place])
            added = SCALE * ((x[token] * masks[0][row].double()) @ factors[0][e].T) @ factors[1][e].T
            gate_up = x[token] @ w1[e] + b1[e] + added
            gate, up = gate_up[0::2].clamp(max=LIMIT), gate_up[1::2].clamp(-LIMIT, LIMIT)
            h = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
            added = SCALE * ((h * masks[1][row].double()) @ factors[2][e].T) @ factors[3][e].T
            out = out.index_add(0, torch.tensor([token]), (w[token, place] * (h @ w2[e] + b2[e] + added))[None])
        return out

    wanted = differentiate(exact, [one.double() for one in inputs], problem.d_out.double())
    for name, actual, right in zip(NAMES, found, wanted, strict=True):
        assert relative(actual, right) < 1e-5, name
    assert relative(found[0], problem.expected()[0]) > 1e-2


# Memory.


class Largest(TorchDispatchMode):
    """Notes how many values the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.values = max(self.values, one.numel())
        return result


@pytest.mark.parametrize("backend", ["packed native", "dense torch"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_of_the_size_of_the_weights_is_made(dropout: float, backend: str) -> None:
    num_experts, size, tokens = 4, 256, 6
    blocks, scales = pack(torch.randn(num_experts, 2 * size, size) / 16)
    packed = (PackedWeights(blocks, scales), PackedWeights(*pack(torch.randn(num_experts, size, size) / 16)))
    dense = (DenseWeights(torch.randn(num_experts, size, 2 * size)), DenseWeights(torch.randn(num_experts, size, size)))
    factors = [torch.randn(num_experts, *shape) for shape in ((4, size), (2 * size, 4), (4, size), (size, 4))]
    kind, name = backend.split()
    saved = []

    def run(*given: Tensor) -> Tensor:
        changes = (LowRank(*given[1:3], SCALE, dropout), LowRank(*given[3:], SCALE, dropout))
        indices, routing = torch.tensor([[0, 1], [2, 3], [1, 2]]).repeat(2, 1), torch.full((tokens, 2), 0.5)
        weights = packed if kind == "packed" else dense
        options = {"alpha": ALPHA, "limit": LIMIT, "backend": name, "changes": changes}
        return experts(given[0], indices, routing, *weights, **options)

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    held = {one.data_ptr() for weights in (*packed, *dense) for one in weights.tensors if one is not None}
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
        differentiate(run, [torch.randn(tokens, size), *factors], torch.randn(tokens, size))
    one_expert, of_factors = size * size, num_experts * 2 * size * 4
    assert saved
    assert largest.values <= of_factors < num_experts * one_expert
    more = [one for one in saved if one.untyped_storage().data_ptr() not in held]
    assert max(one.numel() for one in more) <= of_factors
    # Negative control: with the changed weights made, it would be noticed.
    with Largest() as largest:
        factors[1] @ factors[0]
    assert largest.values >= num_experts * one_expert
