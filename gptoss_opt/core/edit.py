"""The journal of what was changed on a model: plain data, so undo is exact and survives deepcopy and pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class _Missing(Enum):
    """Stands for "there was no such attribute". An enum member stays the same object through deepcopy and pickle."""

    MISSING = "missing"


MISSING = _Missing.MISSING


def resolve_path(model: nn.Module, path: str) -> Any:
    """The submodule or attribute (such as `"config"`) at a dotted `path` below `model`; `""` is the model itself."""
    return reduce(getattr, path.split("."), model) if path else model


def _is_ours(current: object, new: object) -> bool:
    return current is new or (
        isinstance(new, str | int | float | tuple) and type(current) is type(new) and current == new
    )


@dataclass(frozen=True)
class SetAttribute:
    """`path.name` went from `old` to `new`."""

    path: str
    name: str
    old: Any
    new: Any

    def intact(self, model: nn.Module) -> bool:
        """Whether the attribute still is what we set."""
        return _is_ours(getattr(resolve_path(model, self.path), self.name, MISSING), self.new)

    def undo(self, model: nn.Module) -> None:
        # What the user has set since stays as the user set it.
        if not self.intact(model):
            return
        owner = resolve_path(model, self.path)
        if self.old is MISSING:
            delattr(owner, self.name)
        else:
            setattr(owner, self.name, self.old)


@dataclass(frozen=True)
class AddPreHook:
    """A forward pre-hook with key `hook_id` was registered on the module at `path`."""

    path: str
    hook_id: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In the process that unpickles, torch counts hooks from zero again: a later hook must not take our number.
        self.__dict__.update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_id + 1)

    def intact(self, model: nn.Module) -> bool:
        """Whether the hook is still there."""
        return self.hook_id in resolve_path(model, self.path)._forward_pre_hooks

    def undo(self, model: nn.Module) -> None:
        module = resolve_path(model, self.path)
        module._forward_pre_hooks.pop(self.hook_id, None)
        module._forward_pre_hooks_with_kwargs.pop(self.hook_id, None)


def exchange(module: nn.Module, name: str, new: Mapping[str, nn.Parameter], *more: str) -> None:
    """Put parameters `new` in the place of `name` (and `more`) of a module, where the order of parameters has them."""
    parameters = [
        pair
        for key, value in module._parameters.items()
        for pair in (new.items() if key == name else () if key in more else ((key, value),))
    ]
    module._parameters.clear()
    module._parameters.update(parameters)


@dataclass
class Relayout:
    """The dense parameter `path.name` went into a storage.

    Attributes:
        sqnr: how exactly, as signal-to-quantisation-noise ratio in dB.
        requires_grad: whether the dense parameter took gradients.
        dense: the parameter itself, until the change is settled: till then it can be put back bit for bit.
    """

    path: str
    name: str
    storage: str
    sqnr: float
    requires_grad: bool
    dense: nn.Parameter | None

    def intact(self, model: nn.Module) -> bool:
        """Whether the parameter is still stored so."""
        return self.name not in resolve_path(model, self.path)._parameters

    def settle(self) -> None:
        """Let go of the dense parameter."""
        self.dense = None

    def undo(self, model: nn.Module) -> None:
        from .layout import STORAGES

        module, storage = resolve_path(model, self.path), STORAGES[self.storage]
        names = [f"{self.name}{suffix}" for suffix in storage.suffixes]
        if not all(name in module._parameters for name in names):
            return
        dense = self.dense
        if dense is None:
            tensors = {suffix: module.get_parameter(f"{self.name}{suffix}") for suffix in storage.suffixes}
            # The model may have been cast since: the rest of the module tells.
            dtype = next(value.dtype for value in module.parameters() if value.is_floating_point())
            dense = nn.Parameter(storage.decode(tensors, dtype), requires_grad=self.requires_grad)
        exchange(module, names[0], {self.name: dense}, *names[1:])


Edit = SetAttribute | AddPreHook | Relayout


@dataclass
class Journal:
    """Makes changes to a model and remembers them, in order."""

    edits: list[Edit] = field(default_factory=list[Edit])

    def set(self, model: nn.Module, path: str, name: str, value: Any) -> None:
        """Set attribute `name` of the object at `path` to `value`."""
        owner = resolve_path(model, path)
        edit = SetAttribute(path, name, getattr(owner, name, MISSING), value)
        setattr(owner, name, value)
        self.edits.append(edit)

    def add_pre_hook(self, model: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        """Register `hook(module, args, kwargs)` before the forward of the module at `path`.

        `hook` is a module-level function, so that the model can still be pickled.
        """
        handle = resolve_path(model, path).register_forward_pre_hook(hook, with_kwargs=True)
        self.edits.append(AddPreHook(path, handle.id))

    def intact(self, model: nn.Module) -> bool:
        """Whether all changes still stand, or the user has changed one of them since."""
        return all(edit.intact(model) for edit in self.edits)

    def settle(self) -> None:
        """Let go of what is only kept in case the change around these fails."""
        for edit in self.edits:
            if isinstance(edit, Relayout):
                edit.settle()

    def undo(self, model: nn.Module) -> None:
        """Put everything back, last change first."""
        while self.edits:
            self.edits.pop().undo(model)
