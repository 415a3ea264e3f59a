"""`Step`: what was measured of one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PARTS = ("attention", "experts", "communication", "other", "head and loss")
"""Where the time of a forward goes."""


@dataclass(frozen=True)
class Step:
    """What was measured of one forward.

    Attributes:
        number: of the forward, from 1.
        tokens: of it.
        seconds: that it took.
        parts: the seconds by part: see `PARTS`.
        tokens_per_second: of all forwards since the last one that was measured, with what lay between them.
        loss: that it returned, if it did.
        grad_norm: of all gradients, when an optimizer made its step after the last one that was measured.
        memory, peak: bytes held after it, and the most in it; on a CPU of the process, on a GPU of torch's allocator.
        planned: the peak of the plan on the model, if there is one.
        collectives: bytes, calls and seconds of what ranks sent each other.
        load: tokens of each expert, by layer.
        sinks: by layer, which part of the attention of the last token goes to the sinks, on average over heads; None
            where a cache or pages hide the keys.
        utilisation: of the GPU, in percent, where NVML tells.
    """

    number: int
    tokens: int
    seconds: float
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

    @property
    def imbalance(self) -> float | None:
        """The tokens of the busiest expert over the mean, in the worst layer."""
        found = [max(layer) * len(layer) / sum(layer) for layer in self.load if sum(layer)]
        return max(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return {**asdict(self), "imbalance": self.imbalance}

    def numbers(self) -> dict[str, float]:
        """What a dashboard draws, by a name."""
        found = {
            "tokens_per_second": self.tokens_per_second,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "memory": self.memory,
            "peak": self.peak,
            "imbalance": self.imbalance,
            "utilisation": self.utilisation,
            "collectives/bytes": self.collectives.get("bytes"),
            **{f"seconds/{part.replace(' ', '_')}": value for part, value in self.parts.items()},
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        shares = ", ".join(f"{part} {value / self.seconds:.0%}" for part, value in self.parts.items() if value)
        said = [f"step {self.number}: {self.tokens:,} tokens in {self.seconds * 1e3:,.1f} ms ({shares})"]
        if self.tokens_per_second is not None:
            said.append(f"{self.tokens_per_second:,.1f} tokens/s")
        said.append(f"memory {self.memory / 1e9:,.2f} GB, peak {self.peak / 1e9:,.2f}")
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm), ("imbalance", self.imbalance)):
            if value is not None:
                said.append(f"{name} {value:.4g}")
        return "; ".join(said)
