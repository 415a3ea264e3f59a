"""`Monitor`: counts the forwards of a model, and measures some of them."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..core import CompatibilityError
from ..core.record import record_of, standing
from ..distributed import local_part
from ..table import Table
from . import outputs
from .meter import Meter
from .step import PARTS, Step

KEPT = 10_000
"""How many steps are kept."""
SINKS_EVERY = 10
"""The sinks are looked at in every so many of the steps that are measured: they take products of their own."""


@dataclass(eq=False)
class Monitor:
    """Counts the forwards of a model, and measures one of every few. Plain data, so that models can be copied.

    Attributes:
        every: how many forwards there are from one that is measured to the next.
        to: where steps are written.
        calls: how many forwards there were.
        steps: the last ones that were measured.
    """

    every: int
    to: tuple[str, ...]
    calls: int = 0
    steps: list[Step] = field(default_factory=list[Step])
    grad_norm: float | None = None
    _tokens: int = 0
    _since: float | None = None

    def forward(self, model: Any, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A forward of the model, measured if it is its turn."""
        self.calls += 1
        tokens = _tokens_of(args, kwargs)
        if (self.calls - 1) % self.every or _captured(model):
            self._tokens += tokens
            return inner(*args, **kwargs)
        check_standing(model)
        begin, since, before = time.perf_counter(), self._since, self._tokens
        _forget_peak(model)
        with Meter(model, sinks=not len(self.steps) % SINKS_EVERY) as meter:
            out = inner(*args, **kwargs)
        MEASURED[model] = self
        step = self._step(model, meter, out, tokens, None if since is None else before / (begin - since))
        self._tokens, self._since, self.grad_norm = tokens, begin, None
        self.steps = [*self.steps[-KEPT + 1 :], step]
        if _writes(model):
            for to in self.to:
                outputs.write(to, step)
        return out

    def _step(self, model: Any, meter: Meter, out: Any, tokens: int, rate: float | None) -> Step:
        parts, loss = meter.parts, getattr(out, "loss", None)
        meeting = meter.collectives["seconds"]
        decoder = parts["decoder"] or meter.seconds
        times = {
            "attention": parts["attention"],
            "experts": parts["experts"],
            "communication": meeting,
            # Collectives are within attention, experts and the rest: what is left is not less than nothing.
            "other": max(0.0, decoder - parts["attention"] - parts["experts"]),
            "head and loss": max(0.0, meter.seconds - decoder),
        }
        memory, peak = _memory(model)
        return Step(
            number=self.calls,
            tokens=tokens,
            seconds=meter.seconds,
            parts=times,
            tokens_per_second=rate,
            loss=None if loss is None else float(loss.detach()),
            grad_norm=self.grad_norm,
            memory=memory,
            peak=peak,
            planned=getattr(getattr(model, "plan", None), "peak_bytes", None),
            collectives=meter.collectives,
            load=meter.load,
            sinks=meter.sinks,
            utilisation=_utilisation(model),
        )

    def report(self, last: int = 10) -> Table:
        """The last steps as a table."""
        headings = ("step", "tokens/s", *PARTS, "memory", "loss", "gradient norm", "imbalance")
        return Table(headings, [_row(step) for step in self.steps[-last:]])

    def plot(self, path: str | None = None) -> Any:
        """Loss, throughput, memory and the load of experts as a picture (needs matplotlib); saved at `path` if given.

        Raises:
            ImportError: matplotlib is not installed: pip install "gptoss-opt[train]".
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 7), layout="constrained")
        axes: Any = figure.subplots(2, 2)
        numbers = [step.number for step in self.steps]
        for place, title, values in (
            (axes[0, 0], "loss", [step.loss for step in self.steps]),
            (axes[0, 1], "tokens/s", [step.tokens_per_second for step in self.steps]),
            (axes[1, 0], "memory, GB", [step.memory / 1e9 for step in self.steps]),
        ):
            known = [(number, value) for number, value in zip(numbers, values, strict=True) if value is not None]
            place.plot([one for one, _ in known], [value for _, value in known])
            place.set_title(title)
            place.set_xlabel("step")
        if self.steps and self.steps[-1].load:
            shown = axes[1, 1].imshow([list(layer) for layer in self.steps[-1].load], aspect="auto")
            figure.colorbar(shown, ax=axes[1, 1])
        axes[1, 1].set_title("tokens of each expert, by layer")
        if path is not None:
            figure.savefig(path)
        return figure


MEASURED: WeakKeyDictionary[nn.Module, Monitor] = WeakKeyDictionary()
"""The models whose last forward was measured."""


def _row(step: Step) -> Sequence[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    shares = [f"{step.parts[part] / step.seconds:.0%}" for part in PARTS]
    return (
        str(step.number),
        number(step.tokens_per_second, ",.1f"),
        *shares,
        f"{step.memory / 1e9:,.2f} GB",
        number(step.loss, ".4f"),
        number(step.grad_norm, ".4g"),
        number(step.imbalance, ".2f"),
    )


def _note_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Note the norm of the gradients of models whose last forward was measured."""
    if not MEASURED:
        return
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model, monitor in list(MEASURED.items()):
        found = [p.grad for p in model.parameters() if p.grad is not None and id(p) in mine]
        if found:
            squares = [float(local_part(one).double().pow(2).sum()) for one in found]
            monitor.grad_norm = math.sqrt(sum(squares))
            del MEASURED[model]


register_optimizer_step_pre_hook(_note_gradients)


def check_standing(model: nn.Module) -> None:
    """Raise `CompatibilityError` if something has since changed what a wrapper set: a kernel could be another."""
    record = record_of(model)
    fallen = [one.wrapper for one, stands in zip(record.applied, standing(record, model), strict=True) if not stands]
    if fallen:
        raise CompatibilityError(
            [
                f"{wrapper!r}: what it set on the model was changed since, so that something else computes. Apply it "
                "again, or undo it."
                for wrapper in fallen
            ]
        )


def _tokens_of(args: Any, kwargs: Any) -> int:
    given = args[0] if args else kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
        return 0 if given is None else given.shape[0] * given.shape[1]
    return int(given.numel())


def _captured(model: Any) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then."""
    return model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _writes(model: nn.Module) -> bool:
    mesh = record_of(model).mesh
    return mesh is None or getattr(mesh, "is_first", True)


def _forget_peak(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)


def _memory(model: Any) -> tuple[int, int]:
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device), torch.cuda.max_memory_allocated(model.device)
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _utilisation(model: Any) -> int | None:
    if model.device.type != "cuda":
        return None
    try:
        return int(torch.cuda.utilization(model.device))
    except (ModuleNotFoundError, RuntimeError):  # NVML is not there
        return None
