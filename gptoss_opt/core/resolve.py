"""From wrappers to what is to be done with a model: their order, what stands in the way, the layout, the backends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..layout import Layout, LayoutError, Mesh, check, check_movable, dense_layout, require, under_zero
from .backend import Choice
from .errors import BackendError, CompatibilityError
from .record import RECORD, held_by, record_of
from .slots import conflicts, working
from .spec import Spec

Choose = Callable[[Spec], Choice | None]


@dataclass(frozen=True)
class Resolved:
    """What is to be done with a model.

    Attributes:
        wrappers: in canonical order.
        choices: the backend of each wrapper that has one.
        layout: how every parameter is to be held.
        mesh: the ranks of the layout's axes, if it has any.
    """

    wrappers: tuple[Spec, ...]
    choices: Mapping[Spec, Choice | None]
    layout: Layout
    mesh: Mesh | None

    @classmethod
    def of(
        cls, stack: Sequence[Spec], choices: Mapping[Spec, Choice | None], layout: Layout, model: nn.Module
    ) -> Resolved:
        """Bind the ranks of the layout's axes, of which all have agreed by now."""
        mesh: Mesh | None = None
        try:
            for wrapper in working(stack):
                mesh = wrapper.bind(model, mesh)
            bound = mesh.coordinate if mesh else {}
            require(
                f"no wrapper binds the ranks of axis {axis.name!r}, over which parameters are split. Define bind."
                for axis in layout.axes
                if axis.name not in bound
            )
        except LayoutError as error:
            raise CompatibilityError([str(error)]) from error
        return cls(tuple(stack), choices, layout, mesh)


def canonical(wrappers: Iterable[Spec]) -> tuple[Spec, ...]:
    """The wrappers in canonical order. Equal ones count once."""
    distinct: list[Spec] = []
    for wrapper in wrappers:
        if wrapper not in distinct:
            distinct.append(wrapper)
    return tuple(sorted(distinct, key=lambda wrapper: (wrapper.phase, wrapper.name)))


def validated(wrappers: Iterable[Spec]) -> tuple[Spec, ...]:
    """The wrappers in canonical order. Raises `CompatibilityError`, with every conflict at once, if there are any."""
    stack = canonical(wrappers)
    if problems := list(conflicts(stack)):
        raise CompatibilityError(problems)
    return stack


def layout_for(stack: Sequence[Spec], model: nn.Module, *, to_move: bool) -> Layout:
    """How all wrappers of a stack together want the parameters of a model held. Needs no other process.

    Raises `LayoutError` if they cannot be held so, or, where they are `to_move`, cannot be read.
    """
    held = held_by(model)
    layout = dense_layout(model, held)
    for wrapper in working(stack):
        layout = wrapper.layout(model, replace(layout, author=repr(wrapper)))
        if not isinstance(layout, Layout):
            raise TypeError(f"{wrapper!r}: layout returned a {type(layout).__name__}, not a Layout.")
    check(layout, model, held)
    if to_move:
        check_movable(layout, model, held)
    return replace(layout, author="")


def choosing(model: nn.Module) -> Choose:
    """What chooses the backend of a wrapper for this model, and remembers it."""
    return functools.cache(lambda wrapper: wrapper.choice(model))


def resolve(wrappers: Iterable[Spec], model: nn.Module, choose: Choose, wrong: Iterable[str] = ()) -> Resolved:
    """Decide what is to be done, together with the other processes that hold the model, if there are any.

    Touches nothing. All problems are collected, then raised together as one `CompatibilityError`, on all processes.
    What is `wrong` with the model itself is one of them, and makes arithmetic pointless.
    """
    stack = canonical(wrappers)
    choices: dict[Spec, Choice | None] = {}
    layout = Layout()
    problems = [*conflicts(stack), *(list(wrong) or _check_all(stack, model, choose, choices))]
    if not problems:
        try:
            layout = layout_for(stack, model, to_move=True)
        except LayoutError as error:
            problems.append(str(error))
    problems += confer(stack, model, problems)
    if problems:
        raise CompatibilityError(problems)
    return Resolved.of(stack, choices, layout, model)


def confer(stack: Sequence[Spec], model: nn.Module | None, problems: Sequence[str]) -> list[str]:
    """What other processes have against a stack, which they are about to apply too; asked once."""
    for wrapper in stack:
        if (found := wrapper.confer(model, stack, problems)) is not None:
            return found
    return []


def model_problems(wrappers: Iterable[Spec], model: nn.Module) -> Iterator[str]:
    """What is wrong with a model that is to be wrapped, whatever the wrappers do."""
    if compiled := _why_compiled(model):
        yield compiled
        return
    if under_zero(model):
        yield (
            "DeepSpeed's ZeRO-3 holds the parameters of this model, in parts that wrappers cannot read. Wrap the model "
            "first, then deepspeed.initialize what you get; load it outside of deepspeed.zero.Init(), which "
            "transformers enters where TrainingArguments with a DeepSpeed config exist already."
        )
        return
    # What is wrong with the kind of model is said once, not once per wrapper.
    hosts = dict.fromkeys(wrapper.host.why_not(model) for wrapper in canonical(wrappers))
    if wrong := [reason for reason in hosts if reason]:
        yield from wrong
    elif inside := [path for path, module in model.named_modules() if path and RECORD in module.__dict__]:
        yield f".{inside[0]} inside this model is wrapped already. undo(model.{inside[0]}), then wrap the whole model."


def _check_all(
    stack: Sequence[Spec], model: nn.Module, choose: Choose, choices: dict[Spec, Choice | None]
) -> Iterator[str]:
    """What this very model has against the wrappers, while the backends that serve them are collected."""
    # What is on the model has been checked on the model as it was without it. But it may have been moved since.
    present = [applied.wrapper for applied in record_of(model).applied]
    for wrapper in working(stack):
        problems = [] if wrapper in present else list(wrapper.check(model))
        if not problems:
            try:
                choices[wrapper] = choose(wrapper)
            except BackendError as error:
                problems = [str(error)]
        yield from (f"{wrapper!r}: {problem}" for problem in problems)


def _why_compiled(model: nn.Module) -> str | None:
    # Both marks of torch.compile: the module it returns, and the call that model.compile() puts in place.
    if hasattr(model, "_orig_mod"):
        return "this model is already torch.compiled. Wrap the model first, then torch.compile what you get."
    if getattr(model, "_compiled_call_impl", None) is not None:
        return "this model is already compiled by model.compile(). Wrap the model first, then compile it."
    return None
