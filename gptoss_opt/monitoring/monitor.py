"""`Monitor`: counts the forwards of a model, and measures some of them."""

from __future__ import annotations

import resource
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import psutil
import torch
from torch import Tensor, distributed, nn

from ..core import CompatibilityError, mesh_of
from ..core.journal import SetAttribute
from ..core.record import fallen_edits, record_of
from ..distributed import ModelMesh
from ..model.implementations import IMPLEMENTATION, implementation_of
from ..table import Table
from . import outputs, pictures
from .meter import Meter
from .ranks import over_ranks
from .step import Step

KEPT = 10_000
"""How many steps are kept."""
SINKS_EVERY = 10
"""The sinks are looked at in every so many of the steps that are measured: they take products of their own."""
LOCK = threading.Lock()
"""Held while a monitor decides whether to measure."""
WATCHED: WeakSet[nn.Module] = WeakSet()
"""The models of which a forward was measured in this process."""


@dataclass(eq=False)
class Running:
    """A forward that is being measured, or was, and whose backward pass and optimizer may still come.

    Attributes:
        thread: that computes it: what others do with the model meanwhile is only counted.
        meter: measures it.
        tokens: of the forward.
        rate: tokens per second of the forwards before.
        step: what was measured, once the forward is done.
    """

    thread: threading.Thread
    meter: Meter
    tokens: int
    rate: float | None
    device: torch.device
    mesh: ModelMesh | None
    step: Step | None = None

    @property
    def whole(self) -> Step | None:
        """The step as it is by now; None while the forward runs."""
        if self.step is None:
            return None
        memory, peak = _memory(self.device)
        times, sent = dict(self.meter.clock.seconds), dict(self.meter.collectives)
        return replace(self.step, parts=times, collectives=sent, memory=memory, peak=peak)


@dataclass(eq=False)
class Monitor:
    """Counts the forwards of a model, and measures one of every few. Can be copied and pickled with its model.

    A step that trains is done, and written, when an optimizer has made its own; without one when the next forward is
    measured.

    Attributes:
        every: how many forwards there are from one that is measured to the next.
        to: where steps are written.
        calls: how many forwards there were.
        done: the last steps that are done.
    """

    every: int
    to: tuple[str, ...]
    calls: int = 0
    done: tuple[Step, ...] = field(default=(), repr=False)
    _measured: int = 0
    _tokens: int = 0
    _since: float | None = None
    _running: Running | None = field(default=None, repr=False)

    @property
    def steps(self) -> list[Step]:
        """The last steps that were measured: those that are done, and one that is not yet, as this rank has it."""
        latest = None if self._running is None else self._running.whole
        return [*self.done, *([] if latest is None else [latest])]

    def begin(self, model: Any, args: Any, kwargs: Any) -> None:
        """A forward of the model begins: measure it, if it is its turn."""
        if torch.compiler.is_compiling() or _in_backward():
            # What is compiled has no steps to look at. What a checkpoint computes again is no other forward.
            return
        tokens = _tokens_of(args, kwargs)
        with LOCK:
            self.calls += 1
            running, thread = self._running, threading.current_thread()
            elsewhere = running is not None and running.thread is not thread and running.thread.is_alive()
            if running is not None and not elsewhere:
                running.meter.close()
            if elsewhere or (self.calls - 1) % self.every or _captured(model):
                self._tokens += tokens
                return
        self.close()
        check_standing(model)
        now = time.perf_counter()
        rate = None if self._since is None else self._tokens / (now - self._since)
        self._tokens, self._since = tokens, now
        meter = Meter(model, sinks=not self._measured % SINKS_EVERY)
        self._running = Running(thread, meter, tokens, rate, model.device, mesh_of(model))
        self._measured += 1
        WATCHED.add(model)
        meter.begin()

    def end(self, model: Any, out: Any) -> None:
        """A forward of the model has ended, with None if it failed."""
        running = self._running
        if running is None or running.step is not None or running.thread is not threading.current_thread():
            return
        running.meter.end()
        if out is None:
            running.meter.close()
            self._running = None
            return
        result = _result(out)
        running.step = self._step(model, running, result)
        if result is not None and result.requires_grad:
            running.meter.follow(result)
        else:
            self.close()

    def _step(self, model: Any, running: Running, result: Tensor | None) -> Step:
        memory, peak = _memory(running.device)
        return Step(
            number=self.calls,
            tokens=running.tokens,
            parts=running.meter.clock.seconds,
            tokens_per_second=running.rate,
            loss=float(result.detach()) if result is not None and result.dim() == 0 else None,
            grad_norm=None,
            memory=memory,
            peak=peak,
            planned=getattr(getattr(model, "plan", None), "peak_bytes", None),
            collectives=running.meter.collectives,
            load=running.meter.load,
            sinks=running.meter.sinks,
            utilisation=_utilisation(running.device),
            kernels={part: implementation_of(model.config, part) for part in IMPLEMENTATION},
        )

    @property
    def waits(self) -> bool:
        """Whether a step waits for an optimizer. One that steps within the backward pass has not all gradients yet."""
        running = self._running
        return running is not None and running.step is not None and not running.meter.clock.runs

    def note_gradients(self, norm: float) -> None:
        """Note the norm of all gradients in the step that waits."""
        if self._running is not None and self._running.step is not None:
            self._running.step = replace(self._running.step, grad_norm=norm)

    @property
    def noted(self) -> bool:
        """Whether the step that waits has the norm of its gradients."""
        running = self._running
        return running is not None and running.step is not None and running.step.grad_norm is not None

    def close(self) -> None:
        """Complete the step that is measured, if there is one, and write it; ranks that share the model do together."""
        running, self._running = self._running, None
        if running is None:
            return
        running.meter.close()
        step = running.whole
        if step is None:
            return
        if running.mesh is not None:
            step = over_ranks(step, running.mesh, running.device)
        self.done = (*self.done[-KEPT + 1 :], step)
        if _is_first(running.mesh):
            for to in self.to:
                outputs.write(to, step)

    def __getstate__(self) -> dict[str, Any]:
        # What is being measured belongs to this model, in this process.
        return {**vars(self), "_running": None}

    def report(self, last: int = 10) -> Table:
        """The last steps as a table."""
        return pictures.table(self.steps[-last:])

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def plot(self, path: str | None = None) -> Any:
        """Loss, throughput, memory and the load of experts as a picture (needs matplotlib); saved at `path` if given.

        Raises:
            ImportError: matplotlib is not installed: pip install "gptoss-opt[train]".
        """
        figure = pictures.figure(self.steps)
        if path is not None:
            figure.savefig(path)
        return figure


def monitor_on(model: nn.Module) -> Monitor | None:
    """The monitor on a model; None if there is none."""
    states = (applied.state for applied in record_of(model).applied)
    return next((state for state in states if isinstance(state, Monitor)), None)


def check_standing(model: nn.Module) -> None:
    """Raise `CompatibilityError` if something has since changed what a wrapper set: a kernel could be another.

    The forward of the whole model is not looked at: trainers put their own in its place, and no kernel is in it.
    """
    record = record_of(model)
    fallen = [
        one.wrapper
        for one, edits in zip(record.applied, fallen_edits(record, model), strict=True)
        if any(not (isinstance(edit, SetAttribute) and (edit.path, edit.name) == ("", "forward")) for edit in edits)
    ]
    if fallen:
        raise CompatibilityError(
            [
                f"{wrapper!r}: what it set on the model was changed since, so that something else computes. Apply it "
                "again, or undo it."
                for wrapper in fallen
            ]
        )


def _result(out: Any) -> Tensor | None:
    """The loss that a forward gave, or else the first tensor."""
    given = (out,) if isinstance(out, Tensor) else out.values() if hasattr(out, "values") else out
    return next((one for one in given if isinstance(one, Tensor)), None)


def _tokens_of(args: Any, kwargs: Any) -> int:
    given = args[0] if args else kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
        return 0 if given is None else given.shape[0] * given.shape[1]
    return int(given.numel())


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _captured(model: Any) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then."""
    return model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_first(mesh: ModelMesh | None) -> bool:
    """Whether this rank is the one that writes."""
    if mesh is not None:
        return mesh.is_first
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def _memory(device: torch.device) -> tuple[int, int]:
    """The bytes held now, and the most so far: of a peak that a user measures nothing is forgotten here."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _utilisation(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    try:
        return int(torch.cuda.utilization(device))
    except (ModuleNotFoundError, RuntimeError):  # NVML is not there
        return None
