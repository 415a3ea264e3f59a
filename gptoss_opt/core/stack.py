"""Wrappers and stacks of them as the user holds them: called on a model, a function, or nothing."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from torch import nn

from ..layout import Layout, require
from ..table import Table
from .apply import apply, take_off
from .record import record_of, wrapped_model
from .resolve import layout_for, validated
from .spec import WRAPPERS, Spec

Model = TypeVar("Model", bound=nn.Module)
Target = TypeVar("Target", bound=Callable[..., Any])
"""A model, or a function that returns one."""
Options = ParamSpec("Options")
Built = TypeVar("Built", bound="Wrapper", covariant=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class Wrapper(Spec):
    """Base of all wrappers: what one says of itself is in `Spec`, and called on a model it is applied.

    Example:
        >>> isinstance(with_flash_attention(), Wrapper)
        True
    """

    def __call__(self, target: Target) -> Target:
        """Apply to a model (the same object is returned), or decorate a function that returns one."""
        return _applied_to(target, (self,), repr(self))


class TakesModel(Protocol[Options, Built]):
    """A function of a model, or of a function that returns one, and options; without a model it gives a wrapper."""

    @overload
    def __call__(self, model: None = None, /, *args: Options.args, **options: Options.kwargs) -> Built: ...
    @overload
    def __call__(self, model: Target, /, *args: Options.args, **options: Options.kwargs) -> Target: ...


def takes_model(build: Callable[Options, Built]) -> TakesModel[Options, Built]:
    """Make the public function of a wrapper from one that builds it from options, which are keywords."""

    @functools.wraps(build)
    def public(model: Any = None, **options: Any) -> Any:
        wrapper = cast(Callable[..., Wrapper], build)(**options)
        return wrapper if model is None else wrapper(model)

    signature, kind = inspect.signature(build), inspect.Parameter.POSITIONAL_OR_KEYWORD
    model = inspect.Parameter("model", kind, default=None, annotation=Any)
    public.__signature__ = signature.replace(parameters=[model, *signature.parameters.values()])  # type: ignore[attr-defined]
    return cast(TakesModel[Options, Built], public)


@dataclass(frozen=True)
class Stack:
    """An ordered, validated tuple of wrappers. Equal by value, iterable, callable, and JSON both ways.

    A notebook shows it as a table, in the order of its phases.

    Example:
        >>> stack = compose(with_flash_attention(backend="torch"))
        >>> Stack.from_json(stack.to_json()) == stack
        True
        >>> model = stack(model)
        >>> stack_of(model) == stack
        True
    """

    wrappers: tuple[Wrapper, ...] = ()

    def __call__(self, target: Target) -> Target:
        """Apply to a model (the same object is returned), or decorate a function that returns one."""
        return _applied_to(target, self.wrappers, repr(self.wrappers[0]) if len(self) == 1 else repr(self))

    def __iter__(self) -> Iterator[Wrapper]:
        return iter(self.wrappers)

    def __len__(self) -> int:
        return len(self.wrappers)

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.wrappers))})"

    def _repr_html_(self) -> str:
        wrappers = [(str(number), repr(wrapper), wrapper.phase.name) for number, wrapper in enumerate(self, 1)]
        return Table(("", "wrapper", "phase"), wrappers)._repr_html_() if wrappers else "<p>no wrappers</p>"

    def layout(self, model: nn.Module) -> Layout:
        """How every parameter of `model` would be held. Touches nothing, and needs no other process.

        Args:
            model: of which shapes and dtypes are read; it may be on the meta device.

        Raises:
            LayoutError: the model is not of the kind, its sizes do not divide, or two wrappers ask for what cannot be
                both.
            ValueError: the number of ranks is not given, and there is no process group to tell.

        Example:
            >>> layout = compose(shard_tensor_parallel(degree=2), with_mxfp4_experts()).layout(model)
            >>> layout.axes, layout.max_bytes()
            ((Axis(name='tp', degree=2, data_parallel=False),), 207840)
        """
        model = wrapped_model(model)
        require(reason for wrapper in self.wrappers if (reason := wrapper.host.why_not(model)))
        return layout_for(self.wrappers, model, to_move=False)

    def to_json(self) -> str:
        """The stack as JSON: a list of `{"wrapper": name, "options": {option: value, ...}}`."""
        rows = [{"wrapper": wrapper.name, "options": wrapper.options()} for wrapper in self]
        return json.dumps(rows, default=_belongs_to_this_run)

    @classmethod
    def from_json(cls, text: str) -> Stack:
        """The stack that `to_json` wrote. Raises `ValueError` on a name or an option that does not exist."""
        rows = json.loads(text)
        shape = {"wrapper": str, "options": dict}
        if not isinstance(rows, list) or not all(
            isinstance(row, dict)
            and row.keys() == shape.keys()
            and all(isinstance(row[key], kind) for key, kind in shape.items())
            for row in rows
        ):
            raise ValueError('not a stack: expected a JSON list of {"wrapper": name, "options": {option: value, ...}}.')
        return compose(*(_from_json(row["wrapper"], row["options"]) for row in rows))


def _from_json(name: str, options: dict[str, Any]) -> Any:
    if name not in WRAPPERS:
        raise ValueError(f"there is no wrapper {name!r}. Known are {', '.join(sorted(WRAPPERS))}.")
    known = {option.name for option in fields(WRAPPERS[name])}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} has no option {', '.join(map(repr, unknown))}. It has {', '.join(sorted(known))}.")
    return WRAPPERS[name](**{key: _from_lists(value) for key, value in options.items()})


def _belongs_to_this_run(value: object) -> Any:
    raise TypeError(
        f"{value!r} belongs to this run, and JSON cannot hold it. Give the wrapper `degree` instead of a mesh, or the "
        "shape of the mesh: {'ep': 2, 'tp': 8}."
    )


def _from_lists(value: Any) -> Any:
    # JSON has no tuples, and an option is never a list: wrappers are compared and hashed by value.
    return tuple(map(_from_lists, value)) if isinstance(value, list) else value


def _applied_to(target: Target, wrappers: tuple[Spec, ...], label: str) -> Target:
    """A model with wrappers on it, or a function that returns such a model; `label` names the wrappers in errors."""
    if isinstance(target, nn.Module):
        apply(target, wrappers)
        return target
    if inspect.isclass(target):
        raise TypeError(
            f"{label} was given the class {target.__name__}, not a model. Build one first: "
            f"{target.__name__}.from_pretrained(...) or {target.__name__}(config)."
        )
    if isinstance(target, Wrapper | Stack):
        raise TypeError(f"{label} was given {target!r}, not a model. Join wrappers with compose(...).")
    if not callable(target):
        raise TypeError(f"{label} was given a {type(target).__name__}, not a model or a function that returns one.")

    @functools.wraps(target)
    def factory(*args: Any, **kwargs: Any) -> Any:
        model = target(*args, **kwargs)
        if not isinstance(model, nn.Module):
            name = getattr(target, "__name__", repr(target))
            raise TypeError(f"{label} decorates {name}(), which returned a {type(model).__name__}, not a model.")
        apply(model, wrappers)
        return model

    return cast(Target, factory)


def stack_of(model: nn.Module) -> Stack:
    """The stack on `model`, or on the model inside it; the empty stack if nothing was applied.

    Example:
        >>> stack_of(with_flash_attention(model))
        compose(with_flash_attention())
    """
    return Stack(cast(tuple[Wrapper, ...], tuple(applied.wrapper for applied in record_of(model).applied)))


def compose(*wrappers: Wrapper | Stack) -> Stack:
    """Join wrappers (and stacks) into one `Stack`, in canonical order.

    Raises `CompatibilityError` if they cannot stand together; a model is only asked for when it is applied.

    Example:
        >>> fast = compose(with_flash_attention())
        >>> model = fast(model)
    """
    flat: list[Wrapper] = []
    for item in wrappers:
        if isinstance(item, Stack):
            flat.extend(item)
        elif isinstance(item, Wrapper):
            flat.append(item)
        else:
            hint = f" Write {item.__name__}()." if inspect.isfunction(item) else ""
            raise TypeError(f"compose takes wrappers, not {item!r}.{hint}")
    return Stack(cast(tuple[Wrapper, ...], validated(flat)))


def undo(model: Model, *wrappers: Wrapper | Stack | str | Callable[..., Any], discard: bool = False) -> Model:
    """Take wrappers off `model` and return it: the named ones, or all.

    Args:
        model: the wrapped model, or a module around it.
        *wrappers: which to take off, as the public function, its name, the wrapper, or a stack; none means all.
        discard: take them off even if they hold what was not saved, such as trained adapters.

    Raises:
        ValueError: a named wrapper is not on the model.
        IrreversibleError: one of them dropped data that it cannot give back, or holds what was not saved.

    What you changed yourself in the meantime stays as you set it.

    Example:
        >>> model = with_flash_attention(model)
        >>> len(stack_of(undo(model)))
        0
    """
    names = [name for wrapper in wrappers for name in _names_of(wrapper)]
    present = [wrapper.name for wrapper in stack_of(model)]
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"{', '.join(missing)} is not on this model. It has {', '.join(present) or 'no wrappers'}.")
    take_off(wrapped_model(model), names if wrappers else present, discard=discard)
    return model


def _names_of(wrapper: Any) -> list[str]:
    if isinstance(wrapper, Stack):
        return [member.name for member in wrapper]
    name = wrapper if isinstance(wrapper, str) else getattr(wrapper, "name", getattr(wrapper, "__name__", None))
    if name is None:
        raise TypeError(f"undo takes wrappers or their names, not {wrapper!r}.")
    return [str(name)]
