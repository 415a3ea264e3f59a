"""transformers' Trainer, taught what it cannot know: to read adapters from its checkpoints, and to log a monitor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.record import record_of, wrapped_model
from .adapters import AdapterState
from .on_import import when_imported

TRAINER = "transformers.trainer"
"""Its import takes a second and brings much along that who only generates does without: see `when_imported`."""

Load = Callable[[Any, str], object]
"""Reads the adapters in a folder into a model that has such adapters, or raises."""
Numbers = Callable[[nn.Module], dict[str, float] | None]
"""What the monitor on a model has measured last, by a name; None for a model without a monitor."""


def teach_trainer(load: Load) -> None:
    """Let every `Trainer` resume from folders of adapters, and find its best model there, by `load`."""
    when_imported(TRAINER, functools.partial(_teach, load=load))


def tell_trainer_of_monitors(numbers: Numbers) -> None:
    """Let every `Trainer` log the numbers of its model's monitor, for whatever it reports to."""
    when_imported(TRAINER, functools.partial(_teach_logging, numbers=numbers))


class MonitorCallback:
    """Adds what the model's monitor has measured since the last time to what a Trainer logs.

    It is no `TrainerCallback`, whose import takes long, and does nothing at all other events.
    """

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.logged: dict[str, float] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        """Add it to the log, and to the history, which has a copy."""
        found = self.numbers(model)
        if found and found != self.logged:
            self.logged = found
            for row in (logs, state.log_history[-1]):
                row.update(found)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return _do_nothing
        raise AttributeError(name)


def _do_nothing(*_: object, **__: object) -> None:
    """Stand for the events of a Trainer that a callback does not ask for."""


def _teach_logging(module: Any, numbers: Numbers) -> None:
    """Give each `Trainer` that begins to train a model with a monitor a callback, before those that report."""
    trainer = module.Trainer
    train = trainer.train

    @functools.wraps(train)
    def train_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        callbacks = self.callback_handler.callbacks
        if numbers(self.model) is not None and not any(isinstance(one, MonitorCallback) for one in callbacks):
            callbacks.insert(0, MonitorCallback(numbers))
        return train(self, *args, **kwargs)

    trainer.train = train_and_tell


def _teach(module: Any, load: Load) -> None:
    """Put `load` before the two methods of the Trainer that know adapters of peft alone."""
    trainer = module.Trainer
    resume, load_best = trainer._load_from_checkpoint, trainer._load_best_model

    @functools.wraps(resume)
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = _adapted(self, self.model if model is None else model)
        if adapted is None:
            resume(self, resume_from_checkpoint, model)
        else:
            load(adapted, resume_from_checkpoint)

    @functools.wraps(load_best)
    def load_best_model(self: Any) -> None:
        adapted = _adapted(self, self.model)
        if adapted is None:
            load_best(self)
        else:
            load(adapted, self.state.best_model_checkpoint)

    trainer._load_from_checkpoint, trainer._load_best_model = load_from_checkpoint, load_best_model


def _adapted(trainer: Any, model: nn.Module) -> nn.Module | None:
    """The model that a Trainer saves as its adapters; None if it has none, or FSDP or DeepSpeed save all of it."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    inner: nn.Module = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    itself = wrapped_model(inner) is inner  # else a module around it is what is saved
    return inner if itself and any(isinstance(one.state, AdapterState) for one in record_of(inner).applied) else None
