"""`Step`: what was measured of one forward, and of the backward pass that followed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PARTS = ("attention", "experts", "communication", "other", "head and loss")
"""Where the time goes: each moment counts for one of them alone."""


@dataclass(frozen=True)
class Step:
    """What was measured of one forward, and of the backward pass that followed it.

    Where several ranks hold the model together, tokens, their rate and the loads are those of all ranks, memory is that
    of the fullest one, and all else is the mean over them.

    Attributes:
        number: of the forward, from 1.
        tokens: of it.
        parts: the seconds of forward and backward by part: see `PARTS`.
        tokens_per_second: of all forwards since the last one that was measured, with what lay between them.
        loss: that it returned, if it did.
        grad_norm: of all gradients, when an optimizer made the next step.
        memory, peak: bytes held after it, and the most so far; on a CPU of the process, on a GPU of torch's allocator.
        planned: the peak of the plan on the model, if there is one.
        collectives: bytes, calls and seconds of what this package's wrappers sent between ranks.
        load: tokens of each expert, by layer.
        sinks: by layer, which part of the attention of the last token goes to the sinks, on average over heads; None
            where a cache or pages hide the keys.
        utilisation: of the GPU, in percent, where NVML tells.
        kernels: what computed attention and experts.
    """

    number: int
    tokens: int
    parts: Mapping[str, float]
    tokens_per_second: float | None
    loss: float | None
    grad_norm: float | None
    memory: int
    peak: int
    planned: int | None
    collectives: Mapping[str, float]
    load: Sequence[Sequence[int]]
    sinks: Sequence[float | None]
    utilisation: int | None
    kernels: Mapping[str, str]

    @property
    def seconds(self) -> float:
        """How long forward and backward took."""
        return sum(self.parts.values())

    @property
    def imbalance(self) -> float | None:
        """The tokens of the busiest expert over the mean, in the worst layer."""
        found = [max(layer) * len(layer) / sum(layer) for layer in self.load if sum(layer)]
        return max(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return {**asdict(self), "seconds": self.seconds, "imbalance": self.imbalance}

    def numbers(self) -> dict[str, float]:
        """What a dashboard draws, by a name."""
        sinks = [share for share in self.sinks if share is not None]
        found = {
            "tokens_per_second": self.tokens_per_second,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "memory": self.memory,
            "peak": self.peak,
            "imbalance": self.imbalance,
            "sinks": sum(sinks) / len(sinks) if sinks else None,
            "utilisation": self.utilisation,
            **{f"collectives/{name}": value for name, value in self.collectives.items() if self.collectives["calls"]},
            **{f"seconds/{part.replace(' ', '_')}": value for part, value in self.parts.items()},
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    @property
    def peak_of_plan(self) -> str:
        """The peak in words, beside the plan if there is one."""
        of = "" if self.planned is None else f" ({self.peak / self.planned:.0%} of the plan)"
        return f"{self.peak / 1e9:,.2f} GB{of}"

    def __str__(self) -> str:
        shares = ", ".join(f"{part} {value / self.seconds:.0%}" for part, value in self.parts.items() if value)
        said = [f"step {self.number}: {self.tokens:,} tokens in {self.seconds * 1e3:,.1f} ms ({shares})"]
        if self.tokens_per_second is not None:
            said.append(f"{self.tokens_per_second:,.1f} tokens/s")
        said.append(f"memory {self.memory / 1e9:,.2f} GB, peak {self.peak_of_plan}")
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm), ("imbalance", self.imbalance)):
            if value is not None:
                said.append(f"{name} {value:.4g}")
        if self.collectives["calls"]:
            said.append(f"{self.collectives['bytes'] / 1e6:,.2f} MB in {self.collectives['calls']:,.0f} collectives")
        said.append(", ".join(f"{part} by {kernel}" for part, kernel in self.kernels.items()))
        return "; ".join(said)
