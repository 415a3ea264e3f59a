"""How wrappers get on a model and off it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .conflicts import holder_of
from .edit import Journal
from .errors import BackendError, IrreversibleError
from .layout import Layout, Source
from .move import move
from .record import RECORD, Applied, Record, record_of, standing
from .wrapper import Report, Wrapper

Wrappers = tuple[Wrapper, ...]
"""In canonical order, validated."""


def move_to(model: nn.Module, target: Wrappers, prefix: int, source: Source | None = None) -> None:
    """Make `target` what is on `model`. The first `prefix` stay; what is behind is taken off, and the rest attached.

    On a failure half-way the model is put back as it was.
    """
    before = tuple(applied.wrapper for applied in record_of(model).applied)
    if stuck := [wrapper for wrapper in before[prefix:] if not wrapper.reversible and wrapper not in target]:
        raise IrreversibleError(
            f"{', '.join(map(repr, stuck))} cannot be taken off: it dropped data. Reload the model and wrap it anew."
        )
    layout = layout_for(target, model)
    record = model.__dict__.setdefault(RECORD, Record())
    # What modules compute with lies under all that wrappers put around them, and goes by how parameters are held.
    prefix = prefix if layout.mesh is None and record.layout.mesh is None else 0
    held, old = record.held, record.layout
    moved = None
    try:
        _detach_from(model, record, prefix)
        if not prefix:
            record.laid_out.undo(model)
        moved = move(model, held, layout, source)
        record.held = moved.held
        _attach_all(model, record, layout, target)
    except BaseException:
        _detach_from(model, record, prefix)
        if not prefix:
            record.laid_out.undo(model)
        if moved:
            moved.undo()
        record.held = held
        _attach_all(model, record, old, before)
        raise
    finally:
        if not record.applied:
            for host, journal in reversed(record.private):
                host.release(model, journal)
            del model.__dict__[RECORD]


def layout_for(target: Sequence[Wrapper], model: nn.Module) -> Layout:
    """How all wrappers of a stack together want the parameters of a model held."""
    working = (wrapper for wrapper in target if not holder_of(wrapper, target))
    return functools.reduce(lambda layout, wrapper: wrapper.layout(model, layout), working, Layout())


def length_of_prefix(model: nn.Module, record: Record, target: Wrappers, *, choose_anew: bool = True) -> int:
    """How many wrappers of `target` are on the model as they should be.

    One whose changes no longer stand, because the user set something else since, is not; nor is, if asked to
    `choose_anew`, one that would choose another backend now.
    """
    if not all(how.stands(model, parameter) for parameter, how in record.held.items()):
        return 0
    there = zip(record.applied, target, standing(record, model), strict=False)
    for length, (applied, wanted, stands) in enumerate(there):
        if applied.wrapper != wanted or applied.holder != holder_of(wanted, target) or not stands:
            return length
        if choose_anew and _outdated(applied, model):
            return length
    return min(len(record.applied), len(target))


def _outdated(applied: Applied, model: nn.Module) -> bool:
    """Whether another backend is to be chosen now, or none: the model was moved or cast since."""
    if applied.holder:
        return False
    try:
        choice = applied.wrapper.choice(model)
    except BackendError:
        return True
    return choice is not None and choice != applied.report.choice


def _detach_from(model: nn.Module, record: Record, length: int) -> None:
    while len(record.applied) > length:
        record.applied[-1].journal.undo(model)
        record.applied.pop()


def _attach_all(model: nn.Module, record: Record, layout: Layout, target: Wrappers) -> None:
    record.layout = layout
    if layout.mesh is not None and not record.laid_out.edits:
        record.laid_out, _ = _journaled(model, functools.partial(layout.mesh.lay_out, model, layout))
    for wrapper in target[len(record.applied) :]:
        if holder := holder_of(wrapper, target):
            report = Report((f"stands by: {holder[0]!r} holds {holder[1]}",))
            record.applied.append(Applied(wrapper, Journal(), report, holder))
            continue
        if not any(type(host) is type(wrapper.host) for host, _ in record.private):
            own = _journaled(model, functools.partial(wrapper.host.privatise, model))[0]
            record.private.append((wrapper.host, own))
        journal, report = _journaled(model, functools.partial(_attach, model, wrapper))
        record.applied.append(Applied(wrapper, journal, report))


def _attach(model: nn.Module, wrapper: Wrapper, journal: Journal) -> Report:
    report = wrapper.attach(model, journal)
    if not isinstance(report, Report):
        raise TypeError(f"{wrapper!r}: attach returned a {type(report).__name__}, not a Report.")
    return report


def _journaled(model: nn.Module, change: Callable[[Journal], Any]) -> tuple[Journal, Any]:
    """Make a change, and return its journal and result; if it fails, what it did is undone."""
    journal = Journal()
    try:
        return journal, change(journal)
    except BaseException:
        journal.undo(model)
        raise
