"""Attention by the native library: what it takes is what the reference says; all else goes to torch's kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoss_opt.kernels import native as library
from gptoss_opt.kernels.attention import Rules, Visible, attention
from gptoss_opt.kernels.attention.impl import native
from gptoss_opt.kernels.attention.impl.reference import reference_attention
from gptoss_opt.kernels.attention.op import sink_attention
from gptoss_opt.kernels.attention.visible import dense_mask
from tests.helpers import differentiate, relative
from tests.kernels.problems import SCALE, inputs

if library.why_not("cpu", torch.float32):
    pytest.skip("no native library here", allow_module_level=True)

SETS = range(library.library().best + 1)
BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)
NOTHING_HIDDEN = Visible()


def tensors(num_keys: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """q, k, v and sinks for one query per row."""
    torch.manual_seed(num_keys)
    kv = [torch.randn(batch, 2, num_keys, 32).to(dtype) for _ in range(2)]
    return [torch.randn(batch, 8, 1, 32).to(dtype), *kv, torch.randn(8).to(dtype)]


@dtypes
@pytest.mark.parametrize("which", SETS, ids=[library.INSTRUCTION_SETS[one] for one in SETS])
@pytest.mark.parametrize("window", [None, 1, 100, 128])
@pytest.mark.parametrize("num_keys", [1, 15, 64, 65, 300])
def test_is_the_reference(num_keys: int, window: int | None, which: int, dtype: torch.dtype) -> None:
    q, k, v, sinks = tensors(num_keys, dtype)
    rules = Rules(SCALE, window, NOTHING_HIDDEN)
    assert native.serves(q, k, v, rules)
    out, lse = native.forward(q, k, v, sinks, rules, instruction_set=which)
    exact = reference_attention(*(x.double() for x in (q, k, v, sinks)), rules)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert relative(out.double(), exact) < BOUND[dtype]
    seen = k[:, :, -window if window else None :].double().repeat_interleave(4, 1)
    logits = torch.cat([(q.double() @ seen.mT * SCALE)[:, :, 0], sinks.double().expand(2, 8)[..., None]], -1)
    assert relative(lse[..., 0].double(), logits.logsumexp(-1)) < 1e-5
    # Negative controls: the sinks count, and so does the window.
    assert relative(native.forward(q, k, v, sinks + 6, rules)[0].double(), exact) > 10 * BOUND[dtype]
    if window and window < num_keys:
        all_seen = native.forward(q, k, v, sinks, Rules(SCALE, None, NOTHING_HIDDEN))[0]
        assert relative(all_seen.double(), exact) > 10 * BOUND[dtype]


PRODUCTS = library.multiplies_attention(torch.bfloat16, 64)
several = pytest.mark.skipif(not PRODUCTS, reason="this CPU has no products in bfloat16")


@several
@pytest.mark.parametrize("window", [None, 1, 2, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize(
    "shape", [(2, 2, 2), (5, 9, 8), (16, 16, 2), (17, 33, 1), (64, 64, 4), (130, 130, 2), (40, 300, 8), (70, 133, 3)]
)
def test_several_queries(shape: tuple[int, int, int], window: int | None) -> None:
    num_queries, num_keys, group = shape
    torch.manual_seed(num_keys)
    for dim in (64, 128):
        kv = [torch.randn(2, 2, num_keys, dim).bfloat16() for _ in range(2)]
        q, sinks = torch.randn(2, 2 * group, num_queries, dim).bfloat16(), torch.randn(2 * group).bfloat16()
        rules, wide = Rules(dim**-0.5, window, NOTHING_HIDDEN), [x.double() for x in (q, *kv, sinks)]
        assert native.serves(q, *kv, rules)
        out, lse = native.forward(q, *kv, sinks, rules)
        exact = reference_attention(*wide, rules)
        assert (out.shape, out.dtype, out.stride()) == (
            q.shape,
            q.dtype,
            q.transpose(1, 2).contiguous().transpose(1, 2).stride(),
        )
        assert relative(out.double(), exact) < BOUND[torch.bfloat16]
        logits = wide[0] @ wide[1].repeat_interleave(group, 1).mT * dim**-0.5
        logits = logits.masked_fill(~dense_mask(NOTHING_HIDDEN, num_queries, num_keys, window, q.device), -torch.inf)
        sunk = torch.cat([logits, wide[3][:, None, None].expand(2, -1, num_queries, 1)], -1)
        assert relative(lse.double(), sunk.logsumexp(-1)) < 1e-6
        # Negative controls: the sinks count, and where the queries are.
        assert relative(native.forward(q, *kv, sinks + 6, rules)[0].double(), exact) > 10 * BOUND[torch.bfloat16]
        assert relative(native.forward(q.flip(2), *kv, sinks, rules)[0].double(), exact) > 10 * BOUND[torch.bfloat16]


@several
@pytest.mark.parametrize("large", [-1e4, 1e4, -torch.inf])
@pytest.mark.parametrize("window", [None, 3])
def test_extreme_sinks_and_logits_of_several_queries(large: float, window: int | None) -> None:
    q, k, v = (torch.randn(1, heads, 90, 64).bfloat16() for heads in (8, 2, 2))
    sinks = torch.randn(8).bfloat16()
    sinks[3] = large
    for factor in (1, 40):
        rules = Rules(SCALE * factor, window, NOTHING_HIDDEN)
        exact = reference_attention(*(x.double() for x in (q, k, v, sinks)), rules)
        assert relative(native.forward(q, k, v, sinks, rules)[0].double(), exact) < BOUND[torch.bfloat16]


@several
@pytest.mark.parametrize("sink", [0.0, -torch.inf])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_no_number_stays_none(where: str, value: float, sink: float) -> None:
    """Of several queries it shows where it shows in the reference; another token's output stays a number."""
    q, k, v = (torch.randn(1, heads, 20, 64).bfloat16() for heads in (4, 2, 2))
    sinks = torch.full((4,), sink).bfloat16()
    (q if where == "q" else k)[:, :, 5] = value
    rules = Rules(SCALE, 9, NOTHING_HIDDEN)
    exact = reference_attention(*(x.double() for x in (q, k, v, sinks)), rules)
    out, lse = native.forward(q, k, v, sinks, rules)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(lse.isnan(), exact.isnan().any(-1))
    assert exact.isnan().any()
    assert not exact[:, :, :5].isnan().any()


@several
@pytest.mark.parametrize(("heads", "num_queries"), [(3, 4), (4, 30)])
def test_shapes_that_do_not_go_together_are_torchs(heads: int, num_queries: int) -> None:
    q, k = torch.randn(1, heads, num_queries, 64).bfloat16(), torch.randn(1, 2, 20, 64).bfloat16()
    assert not native.serves(q, k, k, Rules(SCALE, None, NOTHING_HIDDEN))


@several
def test_several_queries_of_any_layout() -> None:
    q, k, v = (torch.randn(2, 40, heads, 128).bfloat16()[..., ::2].transpose(1, 2) for heads in (8, 2, 2))
    sinks, rules = torch.randn(8), Rules(SCALE, 20, NOTHING_HIDDEN)
    found = native.forward(q, k, v, sinks, rules)
    for one, other in zip(found, native.forward(*(x.contiguous() for x in (q, k, v)), sinks, rules), strict=True):
        assert torch.equal(one, other)


@several
def test_gradients_of_several_queries_in_bfloat16() -> None:
    some = [torch.randn(2, heads, 50, 64).bfloat16() for heads in (8, 2, 2)] + [torch.randn(8).bfloat16()]
    d_out = torch.randn(2, 8, 50, 64).bfloat16()
    run = lambda *x: attention(*x, scale=0.125, window=16, backend="native")  # noqa: E731
    rules = Rules(0.125, 16, NOTHING_HIDDEN)
    exact = differentiate(lambda *x: reference_attention(*x, rules), [x.double() for x in some], d_out.double())
    plain = differentiate(lambda *x: attention(*x, scale=0.125, window=16, backend="torch"), some, d_out)
    for found, torchs, truth in zip(differentiate(run, some, d_out), plain, exact, strict=True):
        assert relative(found.double(), truth) < max(1.2 * relative(torchs.double(), truth), BOUND[torch.bfloat16])


def test_queries_with_gaps() -> None:
    q, k, v, sinks = tensors(40, torch.float32)
    rules, wide = Rules(SCALE, None, NOTHING_HIDDEN), torch.randn(2, 8, 1, 64)
    for some in (wide[..., ::2], q[:, :1].expand(-1, 8, -1, -1)):
        expected = native.forward(some.contiguous(), k, v, sinks, rules)
        for found, exact in zip(native.forward(some, k, v, sinks, rules), expected, strict=True):
            assert torch.equal(found, exact)


@pytest.mark.parametrize("large", [-1e4, 1e4, -torch.inf])
def test_extreme_sinks_neither_overflow_nor_vanish(large: float) -> None:
    q, k, v, sinks = (x.float() for x in tensors(70, torch.float32))
    sinks[3] = large
    rules = Rules(SCALE, None, NOTHING_HIDDEN)
    exact = reference_attention(q, k, v, sinks, rules)
    torch.testing.assert_close(native.forward(q, k, v, sinks, rules)[0], exact, rtol=1e-5, atol=1e-6)


def test_gradients_through_the_operator() -> None:
    some, d_out = [x.float() for x in tensors(40, torch.float32)], torch.randn(2, 8, 1, 32)
    run = lambda *x: attention(*x, scale=SCALE, window=16, backend="native")  # noqa: E731
    expected = differentiate(lambda *x: reference_attention(*x, Rules(SCALE, 16, NOTHING_HIDDEN)), some, d_out)
    for found, exact in zip(differentiate(run, some, d_out), expected, strict=True):
        assert relative(found, exact) < 1e-5


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("change", ["queries", "padding", "gaps", "dtype"])
def test_all_else_goes_to_torch(change: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, sinks = (x.float() for x in tensors(40, torch.float32))
    visible = NOTHING_HIDDEN
    if change == "queries":
        q = torch.randn(2, 8, 3, 32)
    elif change == "padding":
        visible = Visible(keys=torch.arange(40) > torch.tensor([[3], [-1]]))
    elif change == "gaps":
        k = torch.randn(2, 2, 80, 32)[:, :, ::2]
    else:
        q, k, v, sinks = (x.double() for x in (q, k, v, sinks))
    monkeypatch.setattr(native, "forward", lambda *_: pytest.fail("computed natively"))
    exact = reference_attention(q, k, v, sinks, Rules(SCALE, window, visible))
    for record in (True, False):
        with torch.set_grad_enabled(record):
            found = attention(q, k, v, sinks, scale=SCALE, window=window, visible=visible, backend="native")
        assert relative(found, exact) < 1e-5


def test_opcheck() -> None:
    some = [x.float().requires_grad_() for x in tensors(9, torch.float32)]
    torch.library.opcheck(sink_attention, (*some, *NOTHING_HIDDEN, SCALE, 4, "native"))


def test_says_what_it_does_not_take() -> None:
    assert "multiple of 16" in str(library.why_no_attention("cpu", torch.float32, 24))
    assert "float16" in str(library.why_no_attention("cpu", torch.float16, 64))
    assert "cuda" in str(library.why_no_attention("cuda", torch.float32, 64))
    q, k, v, sinks = inputs(1, 9, torch.float32)
    with pytest.raises(ValueError, match="k is torch.float64"):
        native.forward(q, k.double(), v, sinks.float(), Rules(SCALE, None, NOTHING_HIDDEN))
