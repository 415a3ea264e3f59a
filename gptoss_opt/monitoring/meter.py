"""`Meter`: measures one forward of a model, and the backward pass that follows, by hooks that are there meanwhile."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.collectives import OBSERVERS
from ..model.modules import attention_modules, expert_modules
from ..model.sinks import sink_share
from .clock import Clock
from .traffic import Traffic

HEAD, DECODER = "head and loss", "other"
"""The parts that lie around all others."""


class Meter:
    """Hooks on attention, experts and decoder for one forward, and on the tensors that its backward pass goes through.

    It holds no model. Until it is closed, or is no more, collectives are counted.

    Attributes:
        clock: seconds by part.
        collectives: bytes, calls and seconds.
    """

    def __init__(self, model: Any, *, sinks: bool) -> None:
        self.clock = Clock(model.device)
        self._traffic = Traffic(self.clock)
        self.collectives = self._traffic.counts
        self._load: list[Tensor] = []
        self._sinks: list[Tensor | None] = []
        self._handles: list[Any] = []
        self._thread = threading.get_ident()
        OBSERVERS.append(self._traffic)
        # A model whose backward pass never comes may be gone one day, and this with it.
        self._closing = weakref.finalize(self, OBSERVERS.remove, self._traffic)
        experts = [module for _, module in expert_modules(model)]
        attention = [module for _, module in attention_modules(model)]
        # A model without a head is its own decoder.
        self._outer = DECODER if model.base_model is model else HEAD
        decoder = [] if model.base_model is model else [model.base_model]
        for part, modules in (("attention", attention), ("experts", experts), (DECODER, decoder)):
            for module in modules:
                self._before(module, self._beginning(part))
                self._after(module, self._ending(part))
        for module in experts:
            self._before(module, self._counting(model.config.num_local_experts))
        if sinks:
            for module in attention:
                self._after(module, self._look_at_sinks)

    def begin(self) -> None:
        """The forward begins."""
        self._traffic.thread = self._thread
        self.clock.begin(self._outer)

    def end(self) -> None:
        """The forward has ended."""
        self.clock.stop()
        self._traffic.thread = None
        for handle in self._handles:
            handle.remove()

    def follow(self, result: Tensor) -> None:
        """Measure the backward pass from what the forward gave, too."""
        self._when_differentiated(result, self._outer)

    def close(self) -> None:
        """Measure no more."""
        self._closing()

    @property
    def load(self) -> list[list[int]]:
        """Tokens of each expert, by layer."""
        return [one.tolist() for one in self._load]

    @property
    def sinks(self) -> list[float | None]:
        """The part of attention that goes to sinks, by layer."""
        return [None if one is None else float(one) for one in self._sinks]

    def _before(self, module: nn.Module, hook: Callable[[Any, Any, Any], None]) -> None:
        """Call a hook before a module's forward, where this thread computes it."""

        # In another thread torch may call it without the keywords, while this one removes it.
        def here(module: nn.Module, args: Any, *more: Any) -> None:
            if threading.get_ident() == self._thread:
                hook(module, args, *more)

        self._handles.append(module.register_forward_pre_hook(here, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[[Any, Any, Any], None]) -> None:
        """Call a hook after a module's forward, where this thread computes it."""

        def here(module: nn.Module, args: Any, *more: Any) -> None:
            if threading.get_ident() == self._thread:
                hook(module, *more)

        self._handles.append(module.register_forward_hook(here, with_kwargs=True))

    def _beginning(self, part: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Its gradient is the last that the backward pass of this module gives.
            hidden = args[0] if args else kwargs.get("hidden_states")
            if part != DECODER and isinstance(hidden, Tensor):
                self._when_differentiated(hidden, DECODER)
            self.clock.begin(part)

        return begin

    def _ending(self, part: str) -> Callable[..., None]:
        def end(module: nn.Module, kwargs: Any, out: Any) -> None:
            self.clock.end()
            given = out if isinstance(out, Tensor) else out[0]
            if isinstance(given, Tensor):
                self._when_differentiated(given, part)

        return end

    def _when_differentiated(self, tensor: Tensor, part: str) -> None:
        """Turn the clock to a part when the gradient of a tensor is there."""
        if not tensor.requires_grad:
            return

        def turn(gradient: Tensor) -> None:
            if not self._closing.alive:
                return
            if not self.clock.runs:
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(self.clock.stop)  # at the end of this backward pass
            self.clock.turn_to(part)

        tensor.register_hook(turn)

    def _counting(self, num_experts: int) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            indices = args[1]
            inside = indices[(indices >= 0) & (indices < num_experts)]
            self._load.append(inside.flatten().bincount(minlength=num_experts))

        return count

    def _look_at_sinks(self, module: Any, kwargs: Any, out: Any) -> None:
        self._sinks.append(sink_share(module, kwargs))
