"""How long a batcher takes to notice whether the weights have changed, of as many layers as the 20b."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate
from gptoss_opt import load, with_mxfp4_experts
from gptoss_opt.model.serving import WeightsWatch
from gptoss_opt.testing import random_checkpoint

LAYERS, LOOKS, MAX_SECONDS = 24, 100, 1e-4


@dataclass(frozen=True)
class Watching(Case):
    """A look at a packed model of as many layers as the 20b."""

    columns = """
        case   | tensors   | seconds       | asked
        {case} | {tensors} | {seconds:.6f} | < {asked:g}
    """

    def setup(self) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return load(random_checkpoint(Path(folder, "tiny"), "tiny", layers=LAYERS), with_mxfp4_experts())

    def run(self, made: Any, repeats: int) -> list[Point]:
        watch = WeightsWatch(made)

        def look() -> None:
            for _ in range(LOOKS):
                watch.changed()

        seconds = median(alternate({"look": look}, repeats)["look"]) / LOOKS
        return [{"tensors": len([*made.parameters()]), "seconds": round(seconds, 7), "asked": MAX_SECONDS}]

    def verify(self, made: Any, points: list[Point]) -> None:
        """A changed weight is noticed, and once."""
        watch = WeightsWatch(made)
        assert not watch.changed()
        with torch.no_grad():
            made.model.norm.weight.mul_(1)
        assert watch.changed()
        assert not watch.changed()

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        return points

    def missed(self, points: list[Point]) -> list[str]:
        taken = points[0]["seconds"]
        return [f"a look takes {taken * 1e3:.3f} ms, not less than {MAX_SECONDS * 1e3:g} ms"] * (taken >= MAX_SECONDS)


def cases(settings: Settings, folder: Path) -> list[Case]:
    """One case."""
    return [Watching("a look at the weights")]


SETTINGS = Settings()
