"""Linear layers of few rows by the native library: values on every instruction set, and when it stands aside."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptoss_opt.kernels import kernel_table, native
from gptoss_opt.kernels import linear as linear_module
from gptoss_opt.kernels.kernel_table import is_ever_native
from gptoss_opt.kernels.linear import linear
from tests.helpers import relative

if native.why_not("cpu", torch.float32):
    pytest.skip("no native library here", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)
SETS = range(native.library().best + 1)
SHAPES = [(1, 1), (3, 31), (4, 32), (13, 77), (64, 96), (257, 2880), (5, 40_000)]


def problem(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, shape[1]).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)


@pytest.mark.parametrize("which", SETS, ids=lambda number: native.INSTRUCTION_SETS[number])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, int], dtype: torch.dtype, which: int) -> None:
    bound = 4e-6 if dtype == torch.float32 else 4e-3
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 64):
        x, weight, bias = problem(rows, shape, dtype)
        exact = functional.linear(x.double(), weight.double(), bias.double())
        assert relative(linear(x, weight, bias, instruction_set=which), exact) < bound
        without = linear(x, weight, instruction_set=which)
        assert relative(without, exact - bias.double()) < bound
        # Negative control: one weight that is off is noticed.
        weight[-1, -1] += 8 * shape[1] ** 0.5
        assert relative(linear(x, weight, bias, instruction_set=which), exact) > 4 * bound


def test_any_number_of_dimensions_and_none_of_rows() -> None:
    _, weight, bias = problem(1, (24, 48), torch.float32)
    for shape in ((48,), (1, 48), (2, 3, 48), (2, 0, 48)):
        x = torch.randn(shape)
        torch.testing.assert_close(linear(x, weight, bias), functional.linear(x, weight, bias))


def test_rows_that_lie_apart() -> None:
    _, weight, bias = problem(1, (24, 48), torch.bfloat16)
    x = torch.randn(3, 5, 96).bfloat16()[:, -1:, ::2]
    torch.testing.assert_close(linear(x, weight, bias), functional.linear(x, weight, bias))


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight, bias = problem(4, (24, 48), torch.bfloat16)
    x[1, 3] = float("nan")
    out = linear(x, weight, bias)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_each_row_is_the_same_whatever_is_beside_it() -> None:
    """Greedy tokens of a batcher do not depend on who else is served."""
    for dtype in DTYPES:
        x, weight, bias = problem(64, (400, 2880), dtype)
        alone = torch.cat([linear(row[None], weight, bias) for row in x])
        assert torch.equal(linear(x, weight, bias), alone)


def test_it_stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    is_faster = partial(linear_module.is_faster, "q_proj")
    monkeypatch.setattr(kernel_table, "measured", lambda: {("q_proj", torch.float32): ((8, "native"), (None, "torch"))})
    x, weight, bias = problem(4, (24, 48), torch.float32)
    assert is_faster(x, weight, bias)
    assert is_faster(x, weight, None)
    trained = weight.clone().requires_grad_()
    with torch.no_grad():
        assert is_faster(x, trained, bias)
    aside: dict[str, tuple[Any, ...]] = {
        "gradients of x": (x.clone().requires_grad_(), weight, bias),
        "gradients of weights": (x, trained, bias),
        "gradients of a bias": (x, weight, bias.clone().requires_grad_()),
        "more rows": (torch.cat([x, x, x]), weight, bias),
        "no rows": (x[:0], weight, bias),
        "two dtypes": (x, weight.double(), bias),
        "another dtype": (x.double(), weight.double(), bias.double()),
        "weights that lie apart": (x, weight.T.contiguous().T, bias),
        "negated rows": (torch._neg_view(x), weight, bias),
        "sparse weights": (x, weight.to_sparse(), bias),
        "weights of another length": (x[:, :40], weight, bias),
        "nothing to compute with": (x.to("meta"), weight.to("meta"), bias.to("meta")),
    }
    for what, given in aside.items():
        assert not is_faster(*given), what
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_faster(x, weight, bias)
    seen: list[bool] = []
    torch.func.vmap(lambda row: seen.append(is_faster(row, weight, bias)) or row)(x)
    assert seen == [False]
    assert not linear_module.is_faster("k_proj", x, weight, bias)
    assert (is_ever_native("q_proj", torch.float32), is_ever_native("k_proj", torch.float32)) == (True, False)


def test_what_does_not_go_together_is_named() -> None:
    x, weight, bias = problem(4, (24, 48), torch.float32)
    for given, said in (((x, weight[:, :40], bias), "weight"), ((x, weight, bias[:3]), "bias")):
        with pytest.raises(ValueError, match=said):
            linear(*given)
