"""Head and loss over the vocabulary of gpt-oss, forward and backward, beside transformers' loss and torch's own op.

Losses and gradients of ours are verified against transformers', in the same dtype; all run in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate, device, median_ratio, peak_memory
from gptoss_opt.kernels.loss import chunked_cross_entropy

WORDS = 201_088
ALLOWED = 1.0
"""The most that ours may take of transformers' time."""


class Problem(NamedTuple):
    """The input of the head, its weight, and a label for each token."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor


WHAT = ("loss", "d_hidden", "d_weight")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Our loss, in the chunks of `chunk_tokens="auto"`."""
    return chunked_cross_entropy(None, hidden, labels, [weight], vocabulary=len(weight))


def transformers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, and transformers' loss of them."""
    logits = linear(hidden, weight)[None]
    return ForCausalLMLoss(logits, labels[None], len(weight), shift_labels=labels[None])


def torch_op(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's linear_cross_entropy, in the chunks of its own choice (torch 2.13)."""
    functional: Any = torch.nn.functional
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions")()  # noqa: B009
    loss: Tensor = functional.linear_cross_entropy(hidden, weight, labels, options=options)
    return loss


LOSSES: dict[str, Loss] = {"ours": ours, "transformers": transformers}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    LOSSES["torch"] = torch_op


@dataclass(frozen=True)
class HeadAndLoss(Case):
    """Forward and backward of the head and the loss, in bfloat16."""

    words: int
    hidden: int
    tokens: int
    frozen: bool = False
    peers: tuple[str, ...] = ("transformers",)
    asked: float | None = None
    columns = """
        case   | peer   | peer time      | ours         | ratio        | asked         | peak MiB     | ours
        {case} | {peer} | {theirs:.3g} s | {ours:.3g} s | {ratio:.2f}x | >= {asked:g}x | {held!i:.0f} | {peak!i:.0f}
    """

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """What `problem` takes."""
        return self.words, self.hidden, self.tokens, self.frozen

    def setup(self) -> Problem:
        return problem(*self.shape)

    def run(self, made: Problem, repeats: int) -> list[Point]:
        names = ("ours", *(name for name in self.peers if name in LOSSES))
        times = alternate({name: partial(one_pass, LOSSES[name], made) for name in names}, repeats)
        return [
            {
                "seconds": {name: round(statistics.median(taken), 4) for name, taken in times.items()},
                "ratio": {name: round(median_ratio(times[name], times["ours"]), 2) for name in names[1:]},
                "asked": self.asked,
                "peak": {name: peak_memory(ready, name, *self.shape) for name in names},
            }
        ]

    def verify(self, made: Problem, points: list[Point]) -> None:
        """Loss and gradients are transformers', as far as bfloat16 allows; how far off torch's are is reported."""
        expected = one_pass(transformers, made)
        for name in points[0]["seconds"].keys() - {"transformers"}:
            pairs = zip(WHAT, one_pass(LOSSES[name], made), expected, strict=False)
            off = {what: float((x.double() - y.double()).norm() / y.double().norm()) for what, x, y in pairs}
            if name == "ours":
                assert off["loss"] < 1e-5, f"{self.name}: {off}"
                assert max(off.values()) < 1e-2, f"{self.name}: {off}"
            points[0].setdefault("relative difference to transformers", {})[name] = off

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        point = points[0]
        for peer, ratio in point["ratio"].items():
            times, peaks = point["seconds"], point["peak"]
            shown = {"peer": peer, "ratio": ratio, "asked": self.asked if peer == "transformers" else None}
            yield shown | {
                "theirs": times[peer],
                "ours": times["ours"],
                "held": peaks[peer],
                "peak": peaks["ours"],
            }

    def missed(self, points: list[Point]) -> list[str]:
        ratio = points[0]["ratio"]["transformers"]
        return [] if self.asked is None or ratio >= self.asked else [f"{self.name}: {ratio:.2f}x, not {self.asked:g}x"]


def problem(words: int, hidden: int, tokens: int, frozen: bool = False) -> Problem:
    """Random hidden states, weights, which may be frozen, and labels."""
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, hidden), torch.randn(words, hidden) / hidden**0.5
    x, weight = (tensor.to(device(), torch.bfloat16).requires_grad_() for tensor in (x, weight))
    return Problem(x, weight.requires_grad_(not frozen), torch.randint(words, (tokens,), device=device()))


def one_pass(loss: Loss, made: Problem) -> list[Tensor]:
    """The loss and its gradients."""
    found = loss(*made)
    trained = [made.hidden, made.weight] if made.weight.requires_grad else [made.hidden]
    return [found.detach(), *torch.autograd.grad(found, trained)]


def ready(name: str, *shape: Any) -> Callable[[], object]:
    """One pass of a problem of this shape, ready to run."""
    one_pass(LOSSES[name], problem(1000, 16, 8))  # what is allocated once, on first use
    return partial(one_pass, LOSSES[name], problem(*shape))


def cases(settings: Settings, folder: Path) -> list[Case]:
    """The vocabulary of gpt-oss, with a small hidden size and that of the 20b, and one that torch's op is fit for."""
    return [
        HeadAndLoss("1,024 tokens, hidden 640", WORDS, 640, 1024, asked=ALLOWED),
        HeadAndLoss("4,096 tokens, hidden 640", WORDS, 640, 4096, asked=ALLOWED),
        HeadAndLoss("4,096 tokens, hidden 640, frozen", WORDS, 640, 4096, frozen=True, asked=ALLOWED),
        HeadAndLoss("1,024 tokens, hidden 2,880", WORDS, 2880, 1024, asked=ALLOWED),
        HeadAndLoss("1,024 tokens, 32,000 words, hidden 640", 32_000, 640, 1024, peers=("transformers", "torch")),
    ]


SETTINGS = Settings()
