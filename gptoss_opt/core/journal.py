"""The journal of what was changed on a model: plain data, so undo is exact and survives deepcopy and pickle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial, reduce
from types import MethodType
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


def _find(model: nn.Module, path: str) -> Any:
    """What is at a path now; None if the user has taken it out of the model since."""
    found: Any = model
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found


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

    def intact(self, model: nn.Module, found: dict[tuple[str, str], Any] | None = None) -> bool:
        """Whether the attribute still is what we set.

        Going through edits from the last to the first, `found` holds what later ones found, and gets what this found.
        """
        found = {} if found is None else found
        now = found.get((self.path, self.name), getattr(_find(model, self.path), self.name, MISSING))
        found[self.path, self.name] = self.old
        return _is_ours(now, self.new)

    def stands(self, model: nn.Module, found: dict[tuple[str, str], Any]) -> bool:
        """Whether the change still has its effect: of a forward, also where somebody has put another one around it."""
        intact = self.intact(model, found)
        return intact or (isinstance(self.new, Around) and self.new in _within(self.new.module.forward))

    def undo(self, model: nn.Module) -> None:
        owner = resolve_path(model, self.path)
        if self.old is MISSING:
            delattr(owner, self.name)
        else:
            setattr(owner, self.name, self.old)

    def redo(self, model: nn.Module) -> None:
        setattr(resolve_path(model, self.path), self.name, self.new)


HOOKS = {
    "before": ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    "after": ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
"""Where torch keeps the hooks of a module: the first has them by their keys, the others say how they are called."""


@dataclass(frozen=True)
class AddHook:
    """A hook with key `hook_id` was registered "before" or "after" the forward of the module at `path`."""

    path: str
    hook_id: int
    hook: Callable[..., Any]
    when: str = "before"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In the process that unpickles, torch counts hooks from zero again: a later hook must not take our number.
        self.__dict__.update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_id + 1)

    def intact(self, model: nn.Module, found: dict[tuple[str, str], Any] | None = None) -> bool:
        """Whether the hook is still there."""
        return self.hook_id in getattr(_find(model, self.path), HOOKS[self.when][0], ())

    stands = intact

    def undo(self, model: nn.Module) -> None:
        module = resolve_path(model, self.path)
        for name in HOOKS[self.when]:
            getattr(module, name).pop(self.hook_id, None)

    def redo(self, model: nn.Module) -> None:
        hooks, *how = (getattr(resolve_path(model, self.path), name) for name in HOOKS[self.when])
        hooks[self.hook_id] = self.hook
        for one in how:
            one[self.hook_id] = True
        for later in [number for number in hooks if number > self.hook_id]:
            hooks.move_to_end(later)


Edit = SetAttribute | AddHook


@dataclass(frozen=True, eq=False)
class ClassForward:
    """A module's forward as its class defines it."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.module).forward, self.module))


@dataclass(frozen=True, eq=False)
class Around:
    """A module's forward around the one it had: `function(data, module, inner, ...)`."""

    function: Callable[..., Any]
    data: Any
    module: nn.Module
    inner: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.data, self.module, self.inner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # The Trainer and `generate` ask a model's forward which arguments it takes.
        return inspect.signature(self.inner)


def _within(forward: Any) -> Iterator[Any]:
    """A forward and those that it lies around, as far as wrappers of functions tell: accelerate's and torch's do."""
    while forward is not None:
        yield forward
        forward = next(
            (getattr(forward, name) for name in ("__wrapped__", "inner", "__func__", "func") if hasattr(forward, name)),
            None,
        )


def _own(owner: Any, name: str) -> Any:
    """What an object itself has under a name. What a module's class gives it, it has again once ours is deleted."""
    of_class = getattr(type(owner), name, MISSING)
    if isinstance(owner, nn.Module) and of_class is not MISSING and not isinstance(of_class, property):
        return owner.__dict__.get(name, MISSING)
    return getattr(owner, name, MISSING)


@dataclass
class Journal:
    """Makes changes to a model and remembers them, in order."""

    edits: list[Edit] = field(default_factory=list[Edit])

    def set(self, model: nn.Module, path: str, name: str, value: Any) -> None:
        """Set attribute `name` of the object at `path` to `value`."""
        owner = resolve_path(model, path)
        edit = SetAttribute(path, name, _own(owner, name), value)
        setattr(owner, name, value)
        self.edits.append(edit)

    def method(self, model: nn.Module, path: str, name: str, function: Callable[..., Any]) -> None:
        """Let `function(module, ...)`, a module-level one, be a method of the module at `path`."""
        self.set(model, path, name, partial(function, resolve_path(model, path)))

    def around(self, model: nn.Module, path: str, function: Callable[..., Any], data: Any) -> None:
        """Let `function(data, module, inner, ...)` be the forward of the module at `path`; `inner(...)` is what it was.

        `function` is a module-level one and `data` is plain, so that the model can still be copied and pickled.
        """
        module = resolve_path(model, path)
        inner = module.__dict__.get("forward") or ClassForward(module)
        self.set(model, path, "forward", Around(function, data, module, inner))

    def add_pre_hook(self, model: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        """Register `hook(module, args, kwargs)` before the forward of the module at `path`.

        `hook` is a module-level function, so that the model can still be pickled.
        """
        handle = resolve_path(model, path).register_forward_pre_hook(hook, with_kwargs=True)
        self.edits.append(AddHook(path, handle.id, hook))

    def add_hook(self, model: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        """Register `hook(module, args, kwargs, out)` after the forward of the module at `path`.

        It is called with None for `out` where the forward fails. `hook` is a module-level function, as above.
        """
        handle = resolve_path(model, path).register_forward_hook(hook, with_kwargs=True, always_call=True)
        self.edits.append(AddHook(path, handle.id, hook, "after"))

    def undo(self, model: nn.Module, undone: list[Edit] | None = None) -> None:
        """Put everything back but what the user has set since, last change first; `undone` gets what was put back."""
        for edit in reversed(self.edits):
            if edit.intact(model):
                if undone is not None:  # before it is: to do again what was not yet undone does no harm
                    undone.append(edit)
                edit.undo(model)
