"""How wrappers get on a model and off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..layout import Source, relayout
from .errors import BackendError, IrreversibleError
from .journal import Edit, Journal
from .record import RECORD, Record, record_of, standing
from .resolve import Choose, Resolved, choosing, model_problems, resolve
from .slots import holders, stands_by_for, working
from .spec import Attachment, Filler, Report, Spec


def apply(model: nn.Module, wrappers: Sequence[Spec], source: Source | None = None) -> None:
    """Put `wrappers` on `model`, beside what it has already.

    Everything is checked before anything is touched. Wrappers go on in canonical order: what stands behind the new
    ones is taken off and put on again. On a failure half-way the model is put back as it was. The bytes of parameters
    come from `source`; without one, from the model, and only those are moved that are to be held otherwise.
    """
    record, choose = model.__dict__.get(RECORD) or Record(), choosing(model)
    present = tuple(applied.wrapper for applied in record.applied)
    # What is there already, and as it should be, needs no checking: the model may have been compiled since.
    unchanged = _num_in_place(model, record, present, choose) == len(present) and all(
        new in present for new in wrappers
    )
    if source is None and unchanged:
        return
    wanted = (*present, *wrappers)
    _switch(model, resolve(wanted, model, choose, model_problems(wanted, model)), choose, source)


def take_off(model: nn.Module, names: Sequence[str], *, discard: bool) -> None:
    """Take the wrappers of these names off `model`. The others keep their backends, wherever the model was moved.

    What has something to lose stays, unless that is to be discarded.
    """
    record = record_of(model)
    chosen = {applied.wrapper: applied.choice for applied in record.applied if not applied.holder}
    choose: Choose = lambda wrapper: chosen[wrapper] if wrapper in chosen else wrapper.choice(model)  # noqa: E731
    stuck = [one.wrapper for one in record.applied if one.wrapper.name in names and not one.wrapper.reversible]
    if stuck:
        raise IrreversibleError(
            f"{', '.join(map(repr, stuck))} cannot be taken off: it dropped data. Reload the model and wrap it anew."
        )
    if not names:
        return
    kept = tuple(applied.wrapper for applied in record.applied if applied.wrapper.name not in names)
    target = resolve(kept, model, choose)
    # Asked when all ranks know that they take off the same.
    leaving = [one for one in record.applied if one.wrapper.name in names and not one.holder]
    lost = {one.wrapper: reason for one in leaving if (reason := one.wrapper.why_kept(model, one.state))}
    for wrapper, reason in () if discard else lost.items():
        raise IrreversibleError(f"{wrapper!r}: {reason}; undo(model, {wrapper.name}, discard=True) drops it.")
    _switch(model, target, choose)


def _num_in_place(model: nn.Module, record: Record, target: Sequence[Spec], choose: Choose) -> int:
    """How many wrappers of `target`, from the first, are on the model as they should be.

    One whose changes no longer stand, because the user set something else since, is not; nor is one whose backend would
    be another now, as the model was moved or cast since.
    """
    if not all(how.stands(model, parameter) for parameter, how in record.held.items()):
        return 0
    there = zip(record.applied, target, standing(record, model), strict=False)
    for number, (applied, wanted, stands) in enumerate(there):
        if applied.wrapper != wanted or applied.holder != stands_by_for(wanted, target) or not stands:
            return number
        if not applied.holder and not _still_chosen(choose, applied):
            return number
    return min(len(record.applied), len(target))


def _still_chosen(choose: Choose, applied: Attachment) -> bool:
    try:
        return choose(applied.wrapper) == applied.choice
    except BackendError:
        return False


def _switch(model: nn.Module, target: Resolved, choose: Choose, source: Source | None = None) -> None:
    """Make `target` what is on `model`. What is in place stays; the wrappers behind come off, and the rest go on.

    On a failure half-way the model is put back as it was.
    """
    record: Record = model.__dict__.get(RECORD) or Record()
    # What was attached for another layout, or among other ranks, is attached anew.
    same = (record.layout, record.mesh) == (target.layout, target.mesh)
    num_kept = _num_in_place(model, record, target.wrappers, choose) if same else 0
    states = {applied.wrapper: applied.state for applied in record.applied}
    before, relaid = replace(record, own=list(record.own), applied=list(record.applied)), None
    undone: list[Edit] = []
    try:
        model.__dict__[RECORD] = record
        for one in [record.told, *reversed(record.applied[num_kept:])]:
            one.undo(model, undone)
        del record.applied[num_kept:]
        record.told = Journal()
        relaid = relayout(model, record.held, target.layout, target.mesh, source)
        record.layout, record.mesh, record.held = target.layout, target.mesh, relaid.held
        _attach_all(model, record, target, states)
    except BaseException:
        for one in [record.told, *reversed(record.applied)]:
            if one is not before.told and not any(one is old for old in before.applied):
                one.undo(model)
        if relaid:
            relaid.undo()
        # What wrappers had done is done again edit by edit: asked once more, one that failed might fail again.
        for edit in reversed(undone):
            edit.redo(model)
        for _, journal in reversed(record.own[len(before.own) :]):
            journal.undo(model)
        vars(record).update(vars(before))
        raise
    finally:
        if not record.applied:
            for host, journal in reversed(record.own):
                host.release(model, journal)
            model.__dict__.pop(RECORD, None)


def _attach_all(model: nn.Module, record: Record, target: Resolved, states: Mapping[Spec, Any]) -> None:
    held = holders(working(target.wrappers))
    for wrapper in target.wrappers[len(record.applied) :]:
        holder = stands_by_for(wrapper, target.wrappers)
        one = Attachment(wrapper=wrapper, choice=target.choices.get(wrapper), state=states.get(wrapper), holder=holder)
        record.applied.append(one)  # before it is attached, so that a failure finds it
        if holder:
            one.report = Report((f"stands by: {holder[0]!r} holds {holder[1]}",))
        else:
            if not any(type(host) is type(wrapper.host) for host, _ in record.own):
                record.own.append((wrapper.host, Journal()))
                wrapper.host.own_config(model, record.own[-1][1])
            fillers = [fill for slot, fill in wrapper.defaults.items() if held[slot] == wrapper]
            _attach(fillers, model, one)
    for host, _ in record.own if record.applied else ():
        host.tell_new(record.layout.new, model, record.told)


def _attach(fillers: Sequence[Filler], model: nn.Module, one: Attachment) -> None:
    filled = [sentence for fill in fillers for sentence in fill(model, one) or ()]
    report = one.wrapper.attach(model, one)
    if not isinstance(report, Report):
        raise TypeError(f"{one.wrapper!r}: attach returned a {type(report).__name__}, not a Report.")
    one.report = Report((*report.changed, *filled), report.choice or one.choice)
