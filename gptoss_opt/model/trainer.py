"""transformers' Trainer, taught to read adapters from its checkpoints, which hold nothing else of the model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from ..core.record import record_of, wrapped_model
from .adapters import AdapterState

TRAINER = "transformers.trainer"

Load = Callable[[Any, str], object]
"""Reads the adapters in a folder into a model that has such adapters, or raises."""


def teach_trainer(load: Load) -> None:
    """Let every `Trainer` resume from folders of adapters, and find its best model there, by `load`.

    If its module is not imported yet, it is taught when it is: the import takes a second and brings much along that
    who only generates does without.
    """
    if TRAINER in sys.modules:
        _teach(sys.modules[TRAINER], load)
    else:
        sys.meta_path.insert(0, _OnImport(load))


@dataclass(eq=False)
class _OnImport(MetaPathFinder):
    """Finds the Trainer's module where Python does, and teaches it once it has run."""

    load: Load

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == TRAINER else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_teach(module: ModuleType) -> None:
            run(module)
            _teach(module, self.load)

        vars(spec.loader)["exec_module"] = run_and_teach
        return spec


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
