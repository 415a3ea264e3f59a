"""What is on a model: the record that wrapping leaves on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..layout import Held, Layout, Mesh
from .journal import Edit, Journal
from .spec import Attachment, Host

RECORD = "_gptoss_opt_record"


@dataclass
class Record:
    """What is on a model.

    Attributes:
        own: by host, how the model got its own copy of what it may share.
        layout: how every parameter is to be held.
        mesh: the ranks of the layout's axes, if it has any.
        held: how the parameters that are not plain are held, by the name they have when they are.
        told: how the model was told which parameters are new.
        applied: the wrappers.
    """

    own: list[tuple[Host, Journal]] = field(default_factory=list[tuple[Host, Journal]])
    layout: Layout = field(default_factory=Layout)
    mesh: Mesh | None = None
    held: dict[str, Held] = field(default_factory=dict[str, Held])
    told: Journal = field(default_factory=Journal)
    applied: list[Attachment] = field(default_factory=list[Attachment])


def wrapped_model(model: nn.Module) -> nn.Module:
    """The model that carries a record: this one, or the one inside it (of a compiled, DDP or PEFT module)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got a {type(model).__name__}.")
    return next((module for module in model.modules() if RECORD in module.__dict__), model)


def record_of(model: nn.Module) -> Record:
    """The record on `model`, or on the model inside it; an empty one, not stored, if there is none."""
    return wrapped_model(model).__dict__.get(RECORD) or Record()


def held_by(model: nn.Module) -> dict[str, Held]:
    """How the parameters of a model that are not plain are held, by the name they have when they are."""
    return dict(record_of(model).held)


def layout_of(model: nn.Module) -> Layout:
    """How the parameters of a model are to be held: while wrappers attach, the finished layout."""
    return record_of(model).layout


def mesh_of(model: nn.Module) -> Any:
    """The ranks that hold a model together, bound when its stack was applied; None if this process holds all of it."""
    return record_of(model).mesh


def standing(record: Record, model: nn.Module) -> list[bool]:
    """For each wrapper, whether all its changes still stand, or the user has changed one of them since.

    What a later wrapper has set over an earlier one's change leaves that standing.
    """
    found: dict[tuple[str, str], Any] = {}
    intact = [[edit.intact(model, found) for edit in reversed(one.edits)] for one in reversed(record.applied)]
    return [all(edits) for edits in reversed(intact)]


def fallen_edits(record: Record, model: nn.Module) -> list[list[Edit]]:
    """For each wrapper, those of its changes that have no effect any more, as the user has changed them since.

    A forward of ours has its effect also where others have put theirs around it, or moved its module elsewhere.
    """
    found: dict[tuple[str, str], Any] = {}
    fallen = [
        [edit for edit in reversed(one.edits) if not edit.stands(model, found)] for one in reversed(record.applied)
    ]
    return fallen[::-1]
