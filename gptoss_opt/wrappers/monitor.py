"""`with_monitor`: one of every few forwards is measured, and written down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from ..core import Attachment, Host, Phase, Report, Wrapper, takes_model
from ..model.host import GPT_OSS
from ..model.trainer import tell_trainer_of_monitors
from ..monitoring.monitor import Monitor, monitor_on
from ..monitoring.outputs import named, why_not

MONITORED = "who measures forwards"
"""A slot of a model: see `Wrapper`."""


@dataclass(frozen=True, kw_only=True, repr=False)
class WithMonitor(Wrapper):
    """What `with_monitor` builds. Options: `every`, `to`."""

    every: int = 10
    to: tuple[str, ...] = ("log",)

    name: ClassVar[str] = "with_monitor"
    phase: ClassVar[Phase] = Phase.OBSERVE
    host: ClassVar[Host] = GPT_OSS
    claims: ClassVar[tuple[str, ...]] = (MONITORED,)

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"{self.name}: every is {self.every!r}. Give a whole number from 1 up.")
        if not isinstance(self.to, tuple) or not all(isinstance(one, str) for one in self.to):
            raise ValueError(f"{self.name}: to is {self.to!r}. Give names, such as to=('log', 'steps.jsonl').")
        for one in self.to:
            if reason := why_not(one):
                raise ValueError(f"{self.name}: {reason}")

    def check(self, model: nn.Module) -> Iterable[str]:
        return ()

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        if journal.state is None:
            journal.state = Monitor(self.every, self.to)
        journal.state.every, journal.state.to = self.every, self.to
        # Hooks, not a forward of our own: trainers put theirs in the place of the model's.
        journal.add_pre_hook(model, "", partial(begin, journal.state))
        journal.add_hook(model, "", partial(end, journal.state))
        where = f"; written to {', '.join(self.to)}" if self.to else ""
        return Report((f"one of {self.every} forwards is measured{where}",))


def begin(monitor: Monitor, model: Any, args: Any, kwargs: Any) -> None:
    """A pre-hook of the model."""
    monitor.begin(model, args, kwargs)


def end(monitor: Monitor, model: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A hook of the model."""
    monitor.end(model, out)


@takes_model
def with_monitor(*, every: int = 10, to: tuple[str, ...] = ("log",)) -> WithMonitor:
    """Measure one of every few forwards: where its time goes, memory, loss, and how the experts are used.

    Changes no number, and nothing of the forwards between. A measured one has hooks on attention and experts for as
    long as it and its backward pass run, and on a GPU waits for each part. Before it is measured, what each wrapper set
    on the model is looked at: where something else would compute, it is an error. `monitor_of(model)` has the steps, a
    `report()` and a `plot()`; transformers' Trainer logs them with its own numbers. A model that is compiled afterwards
    is not measured.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a
            wrapper to give to `compose` or `load`.
        every: how many forwards there are from one that is measured to the next.
        to: where steps are written: "log" (the logger "gptoss_opt"), the path of a .jsonl file, "tensorboard",
            "wandb", "mlflow". Of several ranks the first writes.

    Raises:
        CompatibilityError: not a GPT-OSS model, or already compiled; in a forward, if what a wrapper set was changed.
        ValueError: `every` or `to` cannot be.

    Example:
        >>> model = with_monitor(model, every=2)
        >>> for _ in range(3):
        ...     loss = model(input_ids, labels=input_ids).loss
        >>> [step.number for step in monitor_of(model).steps]
        [1, 3]
    """
    return WithMonitor(every=every, to=to)


def monitor_of(model: nn.Module) -> Monitor:
    """The monitor on a model.

    Raises:
        ValueError: there is none.

    Example:
        >>> monitor_of(with_monitor(model)).calls
        0
    """
    found = monitor_on(model)
    if found is None:
        raise ValueError("there is no monitor on this model. Apply with_monitor(model) first.")
    return found


def last_numbers(model: nn.Module) -> dict[str, float] | None:
    """What the monitor on a model has measured last, as dashboards draw it; None without a monitor."""
    monitor = monitor_on(model)
    return None if monitor is None else named(monitor.done[-1]) if monitor.done else {}


tell_trainer_of_monitors(last_numbers)
