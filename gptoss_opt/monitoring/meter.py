"""Measures one forward of a model by hooks that are there for that forward alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.collectives import OBSERVERS
from ..model.modules import attention_modules, expert_modules
from ..model.plain import sink_share


class Meter:
    """Hooks on attention, experts and routers while a forward runs; a context.

    Attributes:
        parts: seconds by part.
        load: tokens of each expert, by layer.
        sinks: the part of attention that goes to sinks, by layer.
        collectives: bytes, calls and seconds.
    """

    def __init__(self, model: Any, *, sinks: bool) -> None:
        self.model, self.with_sinks = model, sinks
        self.parts = {"attention": 0.0, "experts": 0.0, "decoder": 0.0}
        self.collectives = {"bytes": 0.0, "calls": 0.0, "seconds": 0.0}
        self._load: list[Tensor] = []
        self._sinks: list[Tensor | None] = []
        self._began: dict[int, float] = {}
        self._handles: list[Any] = []
        self.seconds = 0.0

    def __enter__(self) -> Meter:
        attention = [module for _, module in attention_modules(self.model)]
        experts = [module for _, module in expert_modules(self.model)]
        for part, modules in (("attention", attention), ("experts", experts), ("decoder", [self.model.base_model])):
            for module in modules:
                self._handles.append(module.register_forward_pre_hook(self._begin))
                self._handles.append(module.register_forward_hook(self._ending(part)))
        for module in experts:
            self._handles.append(module.register_forward_pre_hook(self._count))
        if self.with_sinks:
            for module in attention:
                self._handles.append(module.register_forward_hook(self._look_at_sinks, with_kwargs=True))
        OBSERVERS.append(self._meet)
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._now() - self._start
        OBSERVERS.remove(self._meet)
        for handle in self._handles:
            handle.remove()

    @property
    def load(self) -> list[list[int]]:
        """Tokens of each expert, by layer."""
        return [one.tolist() for one in self._load]

    @property
    def sinks(self) -> list[float | None]:
        """The part of attention that goes to sinks, by layer."""
        return [None if one is None else float(one) for one in self._sinks]

    def _now(self) -> float:
        # Parts of a forward on a GPU are told apart by waiting for each: that is why not every step is measured.
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._began[id(module)] = self._now()

    def _ending(self, part: str) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, out: Any) -> None:
            self.parts[part] += self._now() - self._began.pop(id(module))

        return end

    def _count(self, module: Any, args: Any) -> None:
        indices = args[1]
        inside = indices[(indices >= 0) & (indices < self.model.config.num_local_experts)]
        self._load.append(inside.flatten().bincount(minlength=self.model.config.num_local_experts))

    def _look_at_sinks(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        self._sinks.append(sink_share(module, kwargs))

    def _meet(self, kind: str, num_bytes: int, call: Callable[[], object]) -> None:
        begin = self._now()
        call()
        self.collectives["seconds"] += self._now() - begin
        self.collectives["bytes"] += num_bytes
        self.collectives["calls"] += 1
