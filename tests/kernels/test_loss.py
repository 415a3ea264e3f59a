"""The cross entropy in chunks against torch's of all logits: values, gradients, exactness, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.harness import peak_memory
from gptoss_opt.kernels.loss import Function, chunked_cross_entropy, heads, rows_of_chunk, sums, vocabulary
from tests.helpers import assert_as_exact, differentiate, relative

ROWS, HIDDEN, WORDS = 23, 16, 57
CHUNKS = (1, 4, 7, 22, 23, 1000)
HEADS = {"a product": None, "a function": linear}
NAMES = ("loss", "d_hidden", "d_weight")


def problem(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the weight of a head, and labels, of which every fourth does not count."""
    hidden, weight = torch.randn(rows, HIDDEN).to(dtype), torch.randn(WORDS, HIDDEN).to(dtype)
    labels = torch.randint(WORDS, (rows,))
    labels[::4] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Any = None) -> Tensor:
    """What transformers computes, but in float64 where that is due."""
    logits = linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if divisor is None:
        return cross_entropy(logits, labels)
    return cross_entropy(logits, labels, reduction="sum") / divisor


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Function | None:
    """The same head twice; sums, casts and softmaxes go through several blocks."""
    monkeypatch.setattr(sums, "BLOCK", 100)
    monkeypatch.setattr(vocabulary, "BYTES_ON_CPU", 3 * 4 * WORDS)
    return HEADS[request.param]


def chunked(head: Function | None, labels: Tensor, **options: Any) -> Callable[..., Tensor]:
    """The loss in chunks of hidden states and weights."""
    return lambda hidden, *weights: chunked_cross_entropy(
        head, hidden, labels, weights, **{"vocabulary": WORDS, **options}
    )


def both(
    head: Function | None, dtype: torch.dtype, d_loss: float = 1.0, rows: int = ROWS, chunk: int = 1, **options: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Loss and gradients in chunks, by torch from all logits, and that in float64."""
    hidden, weight, labels = problem(dtype, rows)
    ours = chunked(head, labels, chunk=chunk, **options)

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain(hidden, weight, labels, **options)

    d_out = torch.tensor(d_loss)
    exact = differentiate(whole, [hidden.double(), weight.double()], d_out)
    return differentiate(ours, [hidden, weight], d_out), differentiate(whole, [hidden, weight], d_out), exact


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("options", [{}, {"divisor": 9}, {"divisor": torch.tensor(9)}, {"divisor": 2.5}])
def test_loss_and_gradients(head: Any, chunk: int, options: dict[str, Any]) -> None:
    ours, _, exact = both(head, torch.float64, d_loss=-3.7, chunk=chunk, **options)
    for one, other in zip(ours, exact, strict=True):
        assert relative(one, other) < 1e-14


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_all_logits_at_once(head: Any, dtype: torch.dtype, chunk: int) -> None:
    for d_loss in (1.0, 0.3):
        assert_as_exact(NAMES, *both(head, dtype, d_loss, chunk=chunk))


def test_sums_over_many_chunks(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        """That of the gradient of the head, relative to that of one product."""
        ours, base, exact = both(head, torch.bfloat16, rows=600)
        return relative(ours[2], exact[2]) / relative(base[2], exact[2])

    assert error() < 1.1
    # Negative control: sums in bfloat16.
    monkeypatch.setattr(sums, "wide", lambda dtype: dtype)
    assert error() > 2


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_in_float16_wait_for_a_grad_scaler(head: Any, chunk: int) -> None:
    divisor = 2**20 + 1

    def d_hidden(scale: float) -> float:
        """The error of the gradient of a loss that is multiplied before the backward."""
        ours, _, exact = both(head, torch.float16, d_loss=scale, chunk=chunk, divisor=divisor)
        return relative(ours[1], exact[1])

    assert d_hidden(divisor) < 1e-3
    # Negative control: without it they vanish.
    assert d_hidden(1.0) > 0.01


def test_autocast(head: Any) -> None:
    hidden, weight, labels = problem(torch.float32)

    def run(compute: Callable[..., Tensor]) -> list[Tensor]:
        def under(*x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return compute(*x)

        return differentiate(under, [hidden, weight], torch.ones(()))

    ours, base = run(chunked(head, labels, chunk=4)), run(lambda *x: plain(*x, labels))
    exact = differentiate(lambda *x: plain(*x, labels), [hidden.double(), weight.double()], torch.ones(()))
    assert relative(ours[2], exact[2]) > 1e-4, "the products are in bfloat16"
    for one, other, truth in zip(ours, base, exact, strict=True):
        assert one.dtype == other.dtype
        assert relative(one, truth) < 2 * relative(other, truth) + 1e-6


def test_ignored_rows_are_not_computed() -> None:
    hidden, weight, labels = problem()
    seen: list[int] = []

    def head(rows: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(rows))
        return linear(rows, weight)

    chunked(head, labels, chunk=10)(hidden, weight)
    # Chunks are about as large as each other.
    assert seen == [9, 8]
    assert sum(seen) == (labels != -100).sum()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_row_counts(head: Any, chunk: int) -> None:
    hidden, weight, labels = problem()
    labels.fill_(-100)
    found = differentiate(chunked(head, labels, chunk=chunk), [hidden, weight], torch.ones(()))
    expected = differentiate(lambda *x: plain(*x, labels), [hidden, weight], torch.ones(()))
    assert found[0].isnan()
    assert expected[0].isnan()
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(one, other)
        assert not one.any()


def test_without_gradients(head: Any) -> None:
    hidden, weight, labels = problem()
    found = chunked(head, labels, chunk=5)(hidden, weight)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(hidden, weight, labels))
    hidden.requires_grad_()
    with torch.no_grad():
        assert torch.equal(chunked(head, labels, chunk=5)(hidden, weight.requires_grad_()), found)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_of_them_is_frozen(head: Any, trained: str) -> None:
    hidden, weight, labels = problem()
    leaf = (hidden if trained == "hidden" else weight).requires_grad_()
    (found,) = torch.autograd.grad(chunked(head, labels, chunk=5)(hidden, weight), [leaf])
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels), [leaf])
    assert relative(found, expected) < 1e-14


def test_a_weight_that_is_not_used_has_no_gradient() -> None:
    hidden, weight, labels = problem()
    unused = torch.ones(3, requires_grad=True)
    loss = chunked(lambda rows, weight, unused: linear(rows, weight), labels, chunk=5)(
        hidden, weight.requires_grad_(), unused
    )
    assert torch.autograd.grad(loss, [unused], allow_unused=True) == (None,)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_function_whose_weights_are_named(chunk: int) -> None:
    hidden, weight, labels = problem()
    bias, scale = torch.randn(WORDS).double(), torch.tensor(1.3).double()

    def head(rows: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return 5 * torch.tanh((linear(rows, weight) * scale + bias) / 5)

    inputs = [hidden, weight, bias, scale]
    found = differentiate(chunked(head, labels, chunk=chunk), inputs, torch.ones(()))
    expected = differentiate(lambda *x: cross_entropy(head(*x), labels), inputs, torch.ones(()))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-13


@pytest.mark.parametrize("chunk", [5, 1000])
def test_gradients_that_autograd_shares(chunk: int) -> None:
    hidden, weight, labels = problem()
    inputs = [hidden, weight, torch.randn_like(weight), torch.randn_like(weight[:20])]

    def head(rows: Tensor, weight: Tensor, more: Tensor, some: Tensor) -> Tensor:
        return linear(rows, weight + more + torch.nn.functional.pad(some, (0, 0, 0, WORDS - 20)))

    found = differentiate(chunked(head, labels, chunk=chunk), inputs, torch.tensor(3.0))
    expected = differentiate(lambda *x: cross_entropy(head(*x), labels), inputs, torch.tensor(3.0))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-14


def test_logits_beyond_what_exponentials_hold(head: Any) -> None:
    hidden, weight, labels = problem(torch.float32)
    ours = chunked(head, labels, chunk=4)(200 * hidden, weight)
    torch.testing.assert_close(ours, plain(200 * hidden, weight, labels))
    assert ours > 100


def test_backward_as_often_as_is_asked_for(head: Any) -> None:
    hidden, weight, labels = problem()
    loss = chunked(head, labels, chunk=4)(hidden.requires_grad_(), weight)
    first, second = (torch.autograd.grad(loss * k, [hidden], retain_graph=True)[0] for k in (1, 2))
    torch.testing.assert_close(2 * first, second)
    with pytest.raises(RuntimeError, match="a loss in chunks has no second derivatives. Compute it from all logits"):
        torch.autograd.grad(loss, [hidden], create_graph=True)


@pytest.mark.parametrize("label", [WORDS, -1])
def test_labels_outside_the_vocabulary(head: Any, label: int) -> None:
    hidden, weight, labels = problem()
    labels[5] = label
    for requires_grad in (False, True):
        with pytest.raises(IndexError, match=f"label {label} is outside the vocabulary of {WORDS}, and is not ignored"):
            chunked(head, labels)(hidden, weight.requires_grad_(requires_grad))


def test_a_tensor_that_would_get_no_gradient_is_refused() -> None:
    hidden, weight, labels = problem()
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"the head computes with a tensor \[57, 16\] that takes gradients and is no"):
        chunked(lambda rows: linear(rows, weight * 2), labels)(hidden.requires_grad_())


def test_inputs_are_left_as_they_are(head: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels = problem(dtype)
        # Logits that are there already, in the dtype in which the softmax is computed.
        logits = linear(hidden, weight)
        before = [x.clone() for x in (hidden, weight, logits)]
        chunked(heads._same, labels)(logits)
        chunked(head, labels, chunk=4)(hidden.requires_grad_(), weight.requires_grad_()).backward()
        for one, other in zip((hidden, weight, logits), before, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("num_words", "hidden", "itemsize", "expected"),
    [
        (201_088, 0, 2, 667),  # 256 MiB of logits
        (201_088, 0, 4, 333),
        (201_088, 640, 2, 667),
        (201_088, 2880, 2, 1440),  # as much as is there beside the sum of the gradient of the head
        (2**30, 0, 2, 16),
    ],
)
def test_chunks_of_a_size_of_their_own(num_words: int, hidden: int, itemsize: int, expected: int) -> None:
    assert rows_of_chunk(num_words, num_trained=num_words * hidden, itemsize=itemsize) == expected


class Part:
    """A part of a vocabulary, whose other part is known."""

    size = WORDS

    def __init__(self, mine: range) -> None:
        self.mine = mine

    def max(self, x: Tensor) -> Tensor:
        return torch.maximum(x, OTHERS.pop(0))

    def sum(self, x: Tensor) -> Tensor:
        return x + OTHERS.pop(0)


OTHERS: list[Tensor] = []
"""What the process of the other part would send, in order."""


def test_a_part_of_the_vocabulary(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "BYTES_ON_CPU", 2**20)  # one exchange for all rows
    hidden, weight, labels = problem()
    counted = labels != -100
    logits = linear(hidden, weight)[counted]
    cut, chosen = 20, labels[counted]
    other = logits[:, cut:]
    top = logits.amax(-1, keepdim=True)
    there = torch.where(chosen >= cut, logits.gather(1, chosen[:, None])[:, 0], 0)
    OTHERS[:] = [other.amax(-1, keepdim=True), torch.stack([(other - top).exp().sum(-1), there], -1)]

    ours = chunked(head, labels, chunk=ROWS, vocabulary=Part(range(cut)))
    loss, _, d_weight = differentiate(ours, [hidden, weight[:cut]], torch.ones(()))
    exact = differentiate(lambda *x: plain(*x, labels), [hidden, weight], torch.ones(()))
    torch.testing.assert_close(loss, exact[0])
    torch.testing.assert_close(d_weight, exact[2][:cut])


WIDE = 60_000
TOKENS = 1024


def forward_and_backward(kind: str) -> Callable[[], object]:
    hidden, weight = torch.randn(TOKENS, 8, requires_grad=True), torch.randn(WIDE, 8, requires_grad=True)
    labels = torch.randint(WIDE, (TOKENS,))

    def run(tokens: int) -> None:
        if kind in HEADS:
            ours = chunked(HEADS[kind], labels[:tokens], vocabulary=WIDE, chunk=32)
            ours(hidden[:tokens], weight).backward()
        else:
            plain(hidden[:tokens], weight, labels[:tokens]).backward()

    run(8)  # what is allocated once, on first use
    return lambda: run(TOKENS)


def test_the_logits_of_all_rows_are_never_there() -> None:
    whole = TOKENS * WIDE * 4
    for kind in HEADS:
        assert peak_memory(forward_and_backward, kind) < whole / 4
    # Negative control: torch's cross entropy holds them several times.
    assert peak_memory(forward_and_backward, "all logits") > 1.9 * whole


def test_sums_beyond_float16_do_not_overflow() -> None:
    """A row of the head's gradient is a sum over rows, and only its mean need fit."""
    hidden, weight = torch.full((4096, 8), 40.0), torch.randn(32, 8) * 1e-3
    labels = torch.full((4096,), 3)
    found = []
    for loss in (lambda h, w: cross_entropy(linear(h, w).float(), labels), chunked(None, labels, vocabulary=32)):
        trained = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            value = loss(hidden, trained)
        value.backward()
        found.append(trained.grad)
    assert relative(found[1], found[0]) < 1e-2


def test_batched_gradients_are_refused() -> None:
    hidden, weight, labels = problem()
    loss = chunked(None, labels)(hidden.requires_grad_(), weight)
    with pytest.raises(RuntimeError, match="no batched gradients"):
        torch.autograd.grad(loss, [hidden], torch.tensor([1.0, 2.0]).double(), is_grads_batched=True)
