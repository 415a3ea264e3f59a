"""Every backend computes what the reference says, forward and backward, whatever is hidden from the queries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptoss_opt.kernels.attention import Rules, Visible, attention, varlen
from gptoss_opt.kernels.attention.impl.reference import reference_attention
from gptoss_opt.kernels.attention.impl.torch_cpu import TorchCpu
from gptoss_opt.kernels.attention.op import sink_attention
from gptoss_opt.kernels.attention.visible import starts_from_cu_seq_lens, starts_from_positions
from tests.helpers import assert_within_budget, differentiate, relative
from tests.kernels.emulated import EmulatedKernel
from tests.kernels.problems import DIM, GEOMETRY_20B, HEADS, KV_HEADS, PROBLEMS, SCALE, WINDOWS, inputs, visibles


def torch_backend(visible: Visible, window: int | None) -> Callable[..., Tensor]:
    return lambda q, k, v, sinks: attention(q, k, v, sinks, scale=SCALE, window=window, visible=visible)


class Packed(torch.autograd.Function):
    """The varlen path, which on a GPU stands behind the same operator, around an emulated kernel."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, visible, window, knows_sinks):
        ctx.rest = EmulatedKernel(knows_sinks), TorchCpu(), Rules(SCALE, window, visible)
        kernel, masked, rules = ctx.rest
        out, lse = varlen.forward(kernel, masked, q, k, v, sinks, rules)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        kernel, masked, rules = ctx.rest
        grads = varlen.backward(kernel, masked, d_out, q, k, v, out, lse, rules)
        d_sinks = -((sinks[:, None] - lse).exp() * (d_out * out).sum(-1)).sum((0, 2))
        return *grads, d_sinks, None, None, None


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("num_queries", "num_keys", "kind"), PROBLEMS)
@pytest.mark.parametrize("path", ["torch", "packed", "packed, own sinks"])
def test_exact_in_float64(path: str, num_queries: int, num_keys: int, kind: str, window: int | None) -> None:
    tensors, visible = inputs(num_queries, num_keys), visibles(num_queries, num_keys)[kind]
    d_out = torch.randn_like(tensors[0])
    if path == "torch":
        run = torch_backend(visible, window)
    else:
        run = lambda *x: Packed.apply(*x, visible, window, path == "packed, own sinks")  # noqa: E731
    expected = differentiate(lambda *x: reference_attention(*x, Rules(SCALE, window, visible)), tensors, d_out)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv", "dsinks"), differentiate(run, tensors, d_out), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


BUDGET = [
    (dtype, num_queries, num_keys, kind)
    for dtype in (torch.float32, torch.bfloat16)
    for num_queries, num_keys, kind in (
        (200, 200, "nothing hidden"),
        (200, 200, "left padding"),
        (200, 200, "holes"),
        (200, 200, "own mask per head"),
        (70, 210, "packed"),
        (1, 400, "left padding"),
    )
]
BUDGET += [(torch.float16, 200, 200, "right padding")]


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(("dtype", "num_queries", "num_keys", "kind"), BUDGET)
def test_error_budget(dtype: torch.dtype, num_queries: int, num_keys: int, kind: str, window: int | None) -> None:
    # The real head geometry: an error estimated from a handful of heads is a matter of luck.
    visible = visibles(num_queries, num_keys, heads=64)[kind]
    tensors = inputs(num_queries, num_keys, dtype, shape=GEOMETRY_20B)
    scale = GEOMETRY_20B[2] ** -0.5
    assert_within_budget(
        lambda *x: attention(*x, scale=scale, window=window, visible=visible), tensors, visible, scale, window
    )


def test_sinks_matter_and_so_does_their_gradient() -> None:
    q, k, v, sinks = inputs(33, 33)
    d_out = torch.randn_like(q)
    run = torch_backend(Visible(), None)
    out, _, _, _, d_sinks = differentiate(run, [q, k, v, sinks], d_out)
    without = attention(q, k, v, torch.full_like(sinks, -torch.inf), scale=SCALE)
    assert relative(without, out) > 0.05
    # The derivative, by finite differences in float64.
    step = torch.zeros_like(sinks)
    step[1] = 1e-6
    numeric = ((run(q, k, v, sinks + step) - run(q, k, v, sinks - step)) * d_out).sum() / 2e-6
    torch.testing.assert_close(d_sinks[1], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in visibles(33, 33) if kind != "nothing hidden"])
def test_each_restriction_changes_the_output(kind: str) -> None:
    tensors = inputs(33, 33)
    free, restricted = (torch_backend(x, None)(*tensors) for x in (Visible(), visibles(33, 33)[kind]))
    assert relative(restricted, free) > 1e-3


def test_window_counts_the_query_itself() -> None:
    q, k, v, _ = inputs(9, 9)
    alone = attention(q, k, v, torch.full((HEADS,), -1e9).double(), scale=SCALE, window=1)
    torch.testing.assert_close(alone, v.repeat_interleave(HEADS // KV_HEADS, 1))


def test_packed_sequences_equal_separate_runs() -> None:
    q, k, v, sinks = inputs(300, 300)
    starts = starts_from_cu_seq_lens(torch.tensor([0, 70, 71, 300]), 300).expand(2, -1)
    packed = attention(q, k, v, sinks, scale=SCALE, window=64, visible=Visible(starts=starts))
    for a, b in ((0, 70), (70, 71), (71, 300)):
        alone = attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], sinks, scale=SCALE, window=64)
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-12, atol=1e-12)


def test_inputs_of_any_layout() -> None:
    q, k, v, sinks = inputs(16, 16)
    odd = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    assert all(x.stride(-1) == 2 for x in odd)
    torch.testing.assert_close(attention(*odd, sinks, scale=SCALE), attention(q, k, v, sinks, scale=SCALE))
    wide = [q.mT.contiguous().mT, k[..., :1].expand_as(k), v[:, :1].expand_as(v)]
    d_out = torch.randn_like(q).mT.contiguous().mT
    expected = differentiate(lambda *x: reference_attention(*x, Rules(SCALE, 5, Visible())), [*wide, sinks], d_out)
    for a, b in zip(differentiate(torch_backend(Visible(), 5), [*wide, sinks], d_out), expected, strict=True):
        torch.testing.assert_close(a, b)


# torch's own, when its forward-mode derivatives are first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_derivatives_that_only_the_reference_has_are_refused() -> None:
    q, k, v, sinks = inputs(9, 9)
    bias = torch.zeros(1, 1, 9, 9, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="the attention mask requires a gradient"):
        attention(q, k, v, sinks, scale=SCALE, visible=Visible(mask=bias))
    attention(q, k, v, sinks, scale=SCALE, visible=Visible(mask=bias), backend="reference").sum().backward()
    assert bias.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="forward-mode derivatives"):
        torch.func.jvp(lambda q: attention(q, k, v, sinks, scale=SCALE), (q,), (q,))


@pytest.mark.parametrize("size", [20, 100])
def test_an_additive_mask_keeps_its_precision(size: int) -> None:
    tensors = inputs(200, 200, torch.bfloat16, shape=GEOMETRY_20B)
    visible = Visible(mask=size * torch.rand(1, 1, 200, 200))
    run = lambda *x: attention(*x, scale=0.125, visible=visible)  # noqa: E731
    assert_within_budget(run, tensors, visible, 0.125, None)


def test_starts() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 7, 8, 9, 10]])
    assert starts_from_positions(positions).tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6]
    # Positions in padding are arbitrary: they begin nothing.
    valid = torch.tensor([[False, False, True, True, True, True]])
    assert starts_from_positions(torch.tensor([[1, 1, 0, 1, 2, 3]]), valid).tolist() == [[0] * 6]
    # Sequences with padding between them, whatever its position says.
    valid = torch.tensor([[True, True, False, True, True, False]])
    for padding in (0, 2):
        positions = torch.tensor([[0, 1, padding, 0, 1, padding]])
        assert starts_from_positions(positions, valid).tolist() == [[0, 0, 0, 3, 3, 3]]
    assert starts_from_positions(torch.zeros(2, 1, dtype=torch.long)).tolist() == [[0], [0]]
    assert starts_from_cu_seq_lens(torch.tensor([0, 2, 3]), 5).tolist() == [[0, 0, 2, 3, 3]]


@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(0, 3, 3), (1, 0, 4), (1, 0, 0)])
def test_nothing_to_do(batch: int, num_queries: int, num_keys: int) -> None:
    q = torch.randn(batch, HEADS, num_queries, DIM, requires_grad=True)
    k = torch.randn(batch, KV_HEADS, num_keys, DIM)
    out = attention(q, k, k, torch.zeros(HEADS), scale=SCALE)
    assert out.shape == q.shape
    out.sum().backward()


# torch's own, from 2.14 on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    q, k, v, sinks = (x.float().requires_grad_() for x in inputs(9, 20))
    keys = torch.arange(20).expand(2, -1) > 4
    for rest in ((None, keys, None, None), (None, None, None, None)):
        torch.library.opcheck(sink_attention, (q, k, v, sinks, *rest, SCALE, 5, "torch"))


def test_compiles_without_a_graph_break() -> None:
    tensors = [x.float().requires_grad_() for x in inputs(33, 33)]
    visible = visibles(33, 33)["left padding"]
    run = torch_backend(visible, 5)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    d_out = torch.randn_like(tensors[0])
    for a, b in zip(differentiate(compiled, tensors, d_out), differentiate(run, tensors, d_out), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_lowers_the_products() -> None:
    q, k, v, sinks = (x.float() for x in inputs(9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v.bfloat16(), sinks, scale=SCALE)
    assert out.dtype == torch.bfloat16
    assert relative(out, attention(q, k, v, sinks, scale=SCALE)) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.randn(2, 3, 9, DIM)}, "k, v \\[batch, heads, len, head_dim\\]"),
        ({"k": torch.randn(2, 3, 9, DIM), "v": torch.randn(2, 3, 9, DIM)}, "head_dim or heads differ"),
        ({"sinks": torch.zeros(3)}, "one sink per query head: expected \\[4\\], got \\[3\\]"),
        ({"v": torch.randn(2, KV_HEADS, 9, DIM).bfloat16()}, "one dtype"),
        ({"window": 0}, "at least 1"),
        ({"visible": Visible(keys=torch.ones(2, 8).bool())}, "visible.keys is \\[2, 8\\], expected \\[2, 9\\]"),
        ({"visible": Visible(starts=torch.zeros(2, 8).long())}, "visible.starts"),
        ({"visible": Visible(mask=torch.ones(2, 9, 9).bool())}, "an attention mask for 9 queries and 9 keys"),
        ({"visible": Visible(mask=torch.ones(2, 1, 9, 8).bool())}, "an attention mask for 9 queries and 9 keys"),
        ({"q": torch.randn(2, HEADS, 10, DIM)}, "10 queries but only 9 keys"),
        ({"backend": "auto"}, "attention has no backend 'auto'. Use one of 'fa4'"),
        ({"visible": Visible(keys=torch.ones(2, 9).long())}, "visible.keys is bool"),
        ({"visible": Visible(q_start=torch.tensor(3))}, "q_start is 3, but 9 queries among 9 keys start at 0 to 0"),
        ({name: torch.randn(2, 0, 9, DIM) for name in "qkv"} | {"sinks": torch.zeros(0)}, "at least one head"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    q, k, v, sinks = (x.float() for x in inputs(9, 9))
    arguments = {"q": q, "k": k, "v": v, "sinks": sinks, "scale": SCALE, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
