"""Stacks: wrappers in canonical order, validated, applied to a model and taken off it."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

from torch import nn

from .apply import length_of_prefix, move_to
from .conflicts import conflicts, holder_of
from .errors import BackendError, CompatibilityError
from .layout import Source
from .record import RECORD, Record, record_of, wrapped_model
from .wrapper import WRAPPERS, Built, Model, Wrapper


@dataclass(frozen=True)
class Stack:
    """An ordered, validated tuple of wrappers. Equal by value, iterable, callable, and JSON both ways.

    Example:
        >>> stack = compose(with_flash_attention(backend="torch"))
        >>> Stack.from_json(stack.to_json()) == stack
        True
        >>> model = stack(model)
        >>> stack_of(model) == stack
        True
    """

    wrappers: tuple[Wrapper, ...] = ()

    def __iter__(self) -> Iterator[Wrapper]:
        return iter(self.wrappers)

    def __len__(self) -> int:
        return len(self.wrappers)

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.wrappers))})"

    @overload
    def __call__(self, target: Model) -> Model: ...
    @overload
    def __call__(self, target: Callable[..., Built]) -> Callable[..., Built]: ...
    def __call__(self, target: Any) -> Any:
        """Apply to a model (the same object is returned), or decorate a function that returns one."""
        label = repr(self.wrappers[0]) if len(self) == 1 else repr(self)
        if isinstance(target, nn.Module):
            return apply(target, self.wrappers)
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
            return apply(model, self.wrappers)

        return factory

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


def _from_json(name: str, options: dict[str, Any]) -> Wrapper:
    if name not in WRAPPERS:
        raise ValueError(f"there is no wrapper {name!r}. Known are {', '.join(sorted(WRAPPERS))}.")
    known = {option.name for option in fields(WRAPPERS[name])}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} has no option {', '.join(map(repr, unknown))}. It has {', '.join(sorted(known))}.")
    return WRAPPERS[name](**{key: _from_lists(value) for key, value in options.items()})


def _belongs_to_this_run(value: object) -> Any:
    raise TypeError(
        f"{value!r} belongs to this run, and JSON cannot hold it. Give the wrapper `degree` instead of a mesh."
    )


def _from_lists(value: Any) -> Any:
    # JSON has no tuples, and an option is never a list: wrappers are compared and hashed by value.
    return tuple(map(_from_lists, value)) if isinstance(value, list) else value


def stack_of(model: nn.Module) -> Stack:
    """The stack on `model`, or on the model inside it; the empty stack if nothing was applied.

    Example:
        >>> stack_of(with_flash_attention(model))
        compose(with_flash_attention())
    """
    return Stack(tuple(applied.wrapper for applied in record_of(model).applied))


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
    return resolve(flat)


def resolve(wrappers: Iterable[Wrapper], model: nn.Module | None = None) -> Stack:
    """The validated stack of these wrappers, on this model if one is given. Pure: touches nothing.

    Equal wrappers count once. All problems are collected, then raised together as one `CompatibilityError`.
    """
    stack, problems = _examined(wrappers, model)
    if problems:
        raise CompatibilityError(problems)
    return Stack(tuple(stack))


def _examined(wrappers: Iterable[Wrapper], model: nn.Module | None) -> tuple[list[Wrapper], list[str]]:
    """The wrappers in canonical order, and what stands in the way."""
    distinct: list[Wrapper] = []
    for wrapper in wrappers:
        if wrapper not in distinct:
            distinct.append(wrapper)
    stack = sorted(distinct, key=lambda wrapper: (wrapper.phase, wrapper.name))
    problems = list(conflicts(stack))
    if model is not None:
        problems += _model_problems(stack, model)
    return stack, problems


def fail_together(stack: Stack, error: Exception) -> None:
    """Tell the other processes, which are about to agree on a stack, that this one has no model to apply it to."""
    for wrapper in stack:
        if wrapper.confer(None, stack.wrappers, [f"{type(error).__name__}: {error}"]):
            return


def agreed(wrappers: Iterable[Wrapper], model: nn.Module) -> Stack:
    """`resolve`, with the other processes that hold the model together, if there are any."""
    stack, problems = _examined(wrappers, model)
    for wrapper in stack:
        if found := wrapper.confer(model, stack, problems):
            problems += found
            break
    if problems:
        raise CompatibilityError(problems)
    return Stack(tuple(stack))


def _model_problems(stack: list[Wrapper], model: nn.Module) -> list[str]:
    if compiled := _why_compiled(model):
        return [compiled]
    # What is wrong with the kind of model is said once, not once per wrapper, and makes arithmetic pointless.
    hosts = dict.fromkeys(wrapper.host.why_not(model) for wrapper in stack)
    if wrong := [reason for reason in hosts if reason]:
        return wrong
    if inside := [path for path, module in model.named_modules() if path and RECORD in module.__dict__]:
        return [
            f".{inside[0]} inside this model is wrapped already. undo(model.{inside[0]}), then wrap the whole model."
        ]
    working = [wrapper for wrapper in stack if not holder_of(wrapper, stack)]
    return [f"{wrapper!r}: {problem}" for wrapper in working for problem in _problems_of(wrapper, model)]


def _problems_of(wrapper: Wrapper, model: nn.Module) -> list[str]:
    # What is on the model has been checked on the model as it was without it. But it may have been moved since.
    if wrapper not in stack_of(model) and (problems := list(wrapper.check(model))):
        return problems
    try:
        wrapper.choice(model)
    except BackendError as error:
        return [str(error)]
    return []


def _why_compiled(model: nn.Module) -> str | None:
    # Both marks of torch.compile: the module it returns, and the call that model.compile() puts in place.
    if hasattr(model, "_orig_mod"):
        return "this model is already torch.compiled. Wrap the model first, then torch.compile what you get."
    if getattr(model, "_compiled_call_impl", None) is not None:
        return "this model is already compiled by model.compile(). Wrap the model first, then compile it."
    return None


def apply(model: Model, wrappers: Sequence[Wrapper], source: Source | None = None) -> Model:
    """Put `wrappers` on `model`, beside what it has already, and return the same object.

    Everything is checked before anything is touched. Wrappers go on in canonical order: what stands behind the new
    ones is taken off and put on again. On a failure half-way the model is put back as it was. The bytes of what is
    laid out anew come from `source`; without one, from the model.
    """
    record = model.__dict__.get(RECORD) or Record()
    present = tuple(applied.wrapper for applied in record.applied)
    # What is there already, and as it should be, needs no checking: the model may have been compiled since.
    if length_of_prefix(model, record, present) < len(present) or any(new not in present for new in wrappers):
        target = agreed((*present, *wrappers), model).wrappers
        move_to(model, target, length_of_prefix(model, record, target), source)
    return model


def undo(model: Model, *wrappers: Wrapper | Stack | str | Callable[..., Any]) -> Model:
    """Take wrappers off `model` and return it: the named ones, or all.

    Args:
        model: the wrapped model, or a module around it.
        *wrappers: which to take off, as the public function, its name, the wrapper, or a stack; none means all.

    Raises:
        ValueError: a named wrapper is not on the model.
        IrreversibleError: one of them dropped data that it cannot give back.

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
    kept = [wrapper for wrapper in stack_of(model) if wrappers and wrapper.name not in names]
    inner, target = wrapped_model(model), resolve(kept).wrappers
    move_to(inner, target, length_of_prefix(inner, record_of(inner), target, choose_anew=False))
    return model


def _names_of(wrapper: Any) -> list[str]:
    if isinstance(wrapper, Stack):
        return [member.name for member in wrapper]
    name = wrapper if isinstance(wrapper, str) else getattr(wrapper, "name", getattr(wrapper, "__name__", None))
    if name is None:
        raise TypeError(f"undo takes wrappers or their names, not {wrapper!r}.")
    return [str(name)]
