"""Stacks: which wrappers are on a model, in canonical order, and how they get on and off it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, overload

from torch import nn

from .edit import Journal
from .errors import CompatibilityError, IrreversibleError
from .wrapper import WRAPPERS, Built, Host, Model, Report, Wrapper, call_form

RECORD = "_gptoss_opt_record"


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
        return call_form(target, repr(self), lambda model: apply(model, self.wrappers))

    def to_json(self) -> str:
        """The stack as JSON: a list of `{"wrapper": name, option: value, ...}`."""
        return json.dumps([{"wrapper": wrapper.name, **wrapper.options()} for wrapper in self])

    @classmethod
    def from_json(cls, text: str) -> Stack:
        """The stack that `to_json` wrote. Raises `ValueError` on a name or an option that does not exist."""
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "wrapper" in row for row in rows):
            raise ValueError('not a stack: expected a JSON list of {"wrapper": name, option: value, ...}.')
        return compose(*(_from_row(dict(row)) for row in rows))


def _from_row(row: dict[str, Any]) -> Wrapper:
    name = row.pop("wrapper")
    if name not in WRAPPERS:
        raise ValueError(f"there is no wrapper {name!r}. Known are {', '.join(sorted(WRAPPERS))}.")
    known = {option.name for option in fields(WRAPPERS[name])}
    if unknown := sorted(set(row) - known):
        raise ValueError(f"{name} has no option {', '.join(map(repr, unknown))}. It has {', '.join(sorted(known))}.")
    return WRAPPERS[name](**row)


@dataclass
class Applied:
    """One wrapper on a model: what it changed and what it has to say about it."""

    wrapper: Wrapper
    journal: Journal
    report: Report


@dataclass
class Record:
    """What is on a model: by host, how it got its own copy of what it may share, and the wrappers."""

    private: list[tuple[Host, Journal]] = field(default_factory=list[tuple[Host, Journal]])
    applied: list[Applied] = field(default_factory=list[Applied])


def record_of(model: nn.Module) -> Record:
    """The record on `model`; an empty one, not stored, if there is none."""
    return model.__dict__.get(RECORD) or Record()


def stack_of(model: nn.Module) -> Stack:
    """The stack on `model`; the empty stack if nothing was applied.

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
            hint = f" Write {item.__name__}()." if callable(item) and hasattr(item, "__name__") else ""
            raise TypeError(f"compose takes wrappers, not {item!r}.{hint}")
    return resolve(flat)


def resolve(wrappers: Iterable[Wrapper], model: nn.Module | None = None) -> Stack:
    """The validated stack of these wrappers, on this model if one is given. Pure: touches nothing.

    Equal wrappers count once. All problems are collected, then raised together as one `CompatibilityError`.
    """
    stack = sorted(dict.fromkeys(wrappers), key=lambda wrapper: (wrapper.phase, wrapper.name))
    problems = list(_conflicts(stack))
    if model is not None:
        problems += _model_problems(stack, model)
    if problems:
        raise CompatibilityError(problems)
    return Stack(tuple(stack))


def _conflicts(stack: list[Wrapper]) -> Iterator[str]:
    for position, second in enumerate(stack):
        for first in stack[:position]:
            if first.name == second.name:
                yield (
                    f"{first!r} and {second!r}: the same wrapper twice with different options. "
                    f"Keep one; undo(model, {first.name}) takes off the one that is on the model."
                )
                continue
            for slot in sorted(set(first.claims) & set(second.claims)):
                yield f"{first!r} and {second!r} both claim {slot}. Keep one of them."
    for wrapper in stack:
        for other in stack:
            for trait in other.provides:
                if trait in wrapper.refuses:
                    yield f"{wrapper!r} refuses {trait}, set by {other!r}: {wrapper.refuses[trait]}"


def _model_problems(stack: list[Wrapper], model: nn.Module) -> list[str]:
    if compiled := _why_compiled(model):
        return [compiled]
    # What is wrong with the kind of model is said once, not once per wrapper, and makes arithmetic pointless.
    hosts = dict.fromkeys(wrapper.host.why_not(model) for wrapper in stack)
    if wrong := [reason for reason in hosts if reason]:
        return wrong
    return [f"{wrapper!r}: {problem}" for wrapper in stack for problem in wrapper.check(model)]


def _why_compiled(model: nn.Module) -> str | None:
    # Both marks of torch.compile: the module it returns, and the call that model.compile() puts in place.
    if hasattr(model, "_orig_mod"):
        return "this model is already torch.compiled. Wrap the model first, then torch.compile what you get."
    if getattr(model, "_compiled_call_impl", None) is not None:
        return "this model is already compiled by model.compile(). Wrap the model first, then compile it."
    return None


def apply(model: Model, wrappers: Iterable[Wrapper]) -> Model:
    """Put `wrappers` on `model`, beside what it has already, and return the same object.

    Everything is checked before anything is touched. Wrappers go on in canonical order: what stands behind the new
    ones is taken off and put on again. On a failure half-way the model is put back as it was.
    """
    target = resolve((*stack_of(model), *wrappers), model)
    _move_to(model, target)
    return model


def undo(model: Model, *wrappers: Wrapper | str | Callable[..., Any]) -> Model:
    """Take wrappers off `model` and return it: the named ones, or all.

    Args:
        model: the wrapped model.
        *wrappers: which to take off, as the public function, its name, or the wrapper; none means all.

    Raises:
        ValueError: a named wrapper is not on the model.
        IrreversibleError: one of them dropped data that it cannot give back.

    What you changed yourself in the meantime stays as you set it.

    Example:
        >>> model = with_flash_attention(model)
        >>> len(stack_of(undo(model)))
        0
    """
    names = [_name_of(wrapper) for wrapper in wrappers]
    present = [wrapper.name for wrapper in stack_of(model)]
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"{', '.join(missing)} is not on this model. It has {', '.join(present) or 'no wrappers'}.")
    kept = [wrapper for wrapper in stack_of(model) if names and wrapper.name not in names]
    _move_to(model, resolve(kept, model if kept else None))
    return model


def _name_of(wrapper: Any) -> str:
    if isinstance(wrapper, str):
        return wrapper
    name = wrapper.name if isinstance(wrapper, Wrapper) else getattr(wrapper, "__name__", None)
    if name is None:
        raise TypeError(f"undo takes wrappers or their names, not {wrapper!r}.")
    return str(name)


def _move_to(model: nn.Module, target: Stack) -> None:
    """Make `target` the stack on `model`: undo back to the common prefix, then attach the rest.

    A wrapper whose changes no longer stand, because the user set something else since, ends the prefix.
    """
    before = stack_of(model)
    prefix = 0
    for applied, wanted in zip(record_of(model).applied, target, strict=False):
        if applied.wrapper != wanted or not applied.journal.intact(model):
            break
        prefix += 1
    if stuck := [wrapper for wrapper in before.wrappers[prefix:] if not wrapper.reversible]:
        raise IrreversibleError(
            f"{', '.join(map(repr, stuck))} cannot be taken off: it dropped data. Reload the model and wrap it anew."
        )
    record = model.__dict__.setdefault(RECORD, Record())
    try:
        _detach_from(model, record, prefix)
        _attach_all(model, record, target.wrappers[prefix:])
    except BaseException:
        _detach_from(model, record, prefix)
        _attach_all(model, record, before.wrappers[prefix:])
        raise
    finally:
        if not record.applied:
            for host, journal in record.private:
                host.release(model, journal)
            del model.__dict__[RECORD]


def _detach_from(model: nn.Module, record: Record, length: int) -> None:
    while len(record.applied) > length:
        record.applied[-1].journal.undo(model)
        record.applied.pop()


def _attach_all(model: nn.Module, record: Record, wrappers: Iterable[Wrapper]) -> None:
    for wrapper in wrappers:
        if not any(type(host) is type(wrapper.host) for host, _ in record.private):
            record.private.append((wrapper.host, Journal()))
            wrapper.host.privatise(model, record.private[-1][1])
        journal = Journal()
        try:
            report = wrapper.attach(model, journal)
        except BaseException:
            journal.undo(model)
            raise
        record.applied.append(Applied(wrapper, journal, report))
