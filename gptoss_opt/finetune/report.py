"""What a finetuning tells: while it runs, and at the end in a table and a picture."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..table import Table

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
"""How many characters a line of losses has at most."""
PICTURE = "loss.png"


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: what torch allocated on a GPU, else all its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def speed(records: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second, over some steps."""
    return float(sum(record["tokens"] for record in records) / sum(record["seconds"] for record in records))


def sparkline(values: Sequence[float]) -> str:
    """Values as a line of bars, each the mean of some, between the lowest and the highest.

    Example:
        >>> sparkline([4.0, 3.0, 2.0, 1.0])
        '█▆▃▁'
    """
    size = -(-len(values) // WIDTH)
    means = [sum(part := values[at : at + size]) / len(part) for at in range(0, len(values), size)]
    low, height = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / height * (len(BARS) - 1)) if height else 0] for mean in means)


def draw(losses: Sequence[float], file: Path) -> str:
    """Draw losses by step into a file, if matplotlib is there; returns a line of text that shows them, and says so."""
    line = f"loss  {sparkline(losses)}  {losses[0]:.3f} to {losses[-1]:.3f}"
    if importlib.util.find_spec("matplotlib") is None:
        return f"{line}\nFor a picture of it: pip install matplotlib"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", xlim=(1, max(len(losses), 2)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    return f"{line}\nA picture of it: {file}"


@dataclass(frozen=True)
class Summary:
    """What came of a finetuning; prints as text.

    Attributes:
        records: what the log says of each step, from the first one of the run.
        checkpoint: the folder of the last checkpoint.
        num_steps: how many steps the run has.
        code: what to do with it next, in Python.
        picture: the losses, in a line, and where there is a picture of them.
        resume: the command that goes on with the run.
    """

    records: tuple[Mapping[str, Any], ...]
    checkpoint: Path
    num_steps: int
    code: str
    picture: str
    resume: str

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return bool(self.records[-1]["step"] == self.num_steps)

    def __str__(self) -> str:
        first, last = self.records[0], self.records[-1]
        rows = [
            ("steps", f"{last['step']} of {self.num_steps}"),
            ("loss", f"{first['loss']:.4f} at first, {last['loss']:.4f} at last"),
            ("tokens", f"{sum(record['tokens'] for record in self.records):,}"),
            ("speed", f"{speed(self.records):,.0f} tokens/s"),
            ("peak memory", f"{max(record['peak_memory'] for record in self.records) / 1e9:.2f} GB"),
            ("saved in", str(self.checkpoint)),
        ]
        table = Table(("finetuning", "finished" if self.finished else "stopped"), rows)
        after = self.code if self.finished else f"To go on:\n{self.resume}"
        return f"{table}\n\n{self.picture}\n\n{after}"
