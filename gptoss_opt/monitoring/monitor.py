"""`Monitor`: counts the forwards of a model, and measures some of them."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..core import CompatibilityError
from ..core.record import mesh_of, record_of, standing
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


@dataclass(eq=False)
class Opened:
    """A step whose backward pass may still come."""

    step: Step
    meter: Meter
    device: torch.device
    mesh: ModelMesh | None


@dataclass(eq=False)
class Monitor:
    """Counts the forwards of a model, and measures one of every few. Can be copied and pickled with its model.

    A step that trains is done when an optimizer made its step, or the next forward begins.

    Attributes:
        every: how many forwards there are from one that is measured to the next.
        to: where steps are written.
        calls: how many forwards there were.
    """

    every: int
    to: tuple[str, ...]
    calls: int = 0
    _steps: list[Step] = field(default_factory=list[Step])
    _tokens: int = 0
    _since: float | None = None
    _opened: Opened | None = None

    @property
    def steps(self) -> list[Step]:
        """The last steps that were measured."""
        # Ranks put a step together all at once, and this one may be asked alone.
        if self._opened is not None and self._opened.mesh is None:
            self.close()
        return self._steps

    def forward(self, model: Any, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A forward of the model, measured if it is its turn."""
        self.close()
        self.calls += 1
        tokens = _tokens_of(args, kwargs)
        if (self.calls - 1) % self.every or _captured(model):
            self._tokens += tokens
            return inner(*args, **kwargs)
        check_standing(model)
        now = time.perf_counter()
        rate = None if self._since is None else self._tokens / (now - self._since)
        with Meter(model, sinks=not len(self._steps) % SINKS_EVERY) as meter:
            out = inner(*args, **kwargs)
        self._tokens, self._since = tokens, now
        self._opened = Opened(self._step(model, meter, out, tokens, rate), meter, model.device, mesh_of(model))
        result = _result(out)
        if result is not None and result.requires_grad:
            meter.follow(result)
            TRAINED[model] = self
        else:
            self.close()
        return out

    def _step(self, model: Any, meter: Meter, out: Any, tokens: int, rate: float | None) -> Step:
        memory, peak = _memory(model.device)
        loss = getattr(out, "loss", None)
        return Step(
            number=self.calls,
            tokens=tokens,
            parts=meter.clock.seconds,
            tokens_per_second=rate,
            loss=None if loss is None else float(loss.detach()),
            grad_norm=None,
            memory=memory,
            peak=peak,
            planned=getattr(getattr(model, "plan", None), "peak_bytes", None),
            collectives=meter.collectives,
            load=meter.load,
            sinks=meter.sinks,
            utilisation=_utilisation(model.device),
            kernels={part: implementation_of(model.config, part) for part in IMPLEMENTATION},
        )

    def note_gradients(self, model: nn.Module) -> None:
        """Note the norm of all gradients of the model in the step that is open."""
        if self._opened is not None:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            self._opened.step = replace(self._opened.step, grad_norm=_norm(gradients))

    def close(self) -> None:
        """Complete the step that is open, if there is one, and write it; ranks that share the model do so together."""
        opened, self._opened = self._opened, None
        if opened is None:
            return
        opened.meter.close()
        memory, peak = _memory(opened.device)
        step = replace(opened.step, memory=memory, peak=peak)
        if opened.mesh is not None:
            step = over_ranks(step, opened.mesh, opened.device)
        self._steps = [*self._steps[-KEPT + 1 :], step]
        if opened.mesh is None or opened.mesh.is_first:
            for to in self.to:
                outputs.write(to, step)

    def __getstate__(self) -> dict[str, Any]:
        # What is still open belongs to this process.
        return {**vars(self), "_steps": list(self.steps), "_opened": None}

    def report(self, last: int = 10) -> Table:
        """The last steps as a table."""
        return pictures.table(self.steps[-last:])

    def plot(self, path: str | None = None) -> Any:
        """Loss, throughput, memory and the load of experts as a picture (needs matplotlib); saved at `path` if given.

        Raises:
            ImportError: matplotlib is not installed: pip install "gptoss-opt[train]".
        """
        figure = pictures.figure(self.steps)
        if path is not None:
            figure.savefig(path)
        return figure


TRAINED: WeakKeyDictionary[nn.Module, Monitor] = WeakKeyDictionary()
"""The models whose last forward was measured, and waits for an optimizer."""


def _before_optimizer(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Note the norm of the gradients, before the optimizer's step changes or drops them."""
    for model, monitor in _trained_by(optimizer):
        monitor.note_gradients(model)


def _after_optimizer(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """The optimizer has made its step, and with it the step that is open is done."""
    for model, monitor in _trained_by(optimizer):
        del TRAINED[model]
        monitor.close()


def _trained_by(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Module, Monitor]]:
    if not TRAINED:
        return []
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        (model, monitor)
        for model, monitor in list(TRAINED.items())
        if any(parameter.grad is not None and id(parameter) in mine for parameter in model.parameters())
    ]


register_optimizer_step_pre_hook(_before_optimizer)
register_optimizer_step_post_hook(_after_optimizer)


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


def _norm(gradients: list[Tensor]) -> float:
    """The norm of gradients, each of which may be spread over ranks; all of those must ask for it."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for one in gradients:
        by_mesh.setdefault(one.device_mesh if isinstance(one, DTensor) else None, []).append(one)
    norms = [torch.nn.utils.get_total_norm(some) for some in by_mesh.values()]
    return math.hypot(*(float(one.full_tensor() if isinstance(one, DTensor) else one) for one in norms))


def _result(out: Any) -> Tensor | None:
    """The loss that a forward gave, or else the first tensor."""
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    given = (out,) if isinstance(out, Tensor) else out.values() if hasattr(out, "values") else out
    return next((one for one in given if isinstance(one, Tensor)), None)


def _tokens_of(args: Any, kwargs: Any) -> int:
    given = args[0] if args else kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
        return 0 if given is None else given.shape[0] * given.shape[1]
    return int(given.numel())


def _captured(model: Any) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then."""
    return model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
