"""What is on a model: the record that wrapping leaves on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .edit import Journal
from .layout import Layout
from .move import Held
from .wrapper import Host, Report, Wrapper

RECORD = "_gptoss_opt_record"


@dataclass
class Applied:
    """One wrapper on a model: what it changed, what it has to say about it, and for whom it stands by, if it does."""

    wrapper: Wrapper
    journal: Journal
    report: Report
    holder: tuple[Wrapper, str] | None = None


@dataclass
class Record:
    """What is on a model.

    Attributes:
        private: by host, how the model got its own copy of what it may share.
        layout: how the parameters are to be held.
        held: those that are not plain dense ones, by the name they have when they are.
        laid_out: what was changed so that modules compute with what this rank holds.
        applied: the wrappers.
    """

    private: list[tuple[Host, Journal]] = field(default_factory=list[tuple[Host, Journal]])
    layout: Layout = field(default_factory=Layout)
    held: dict[str, Held] = field(default_factory=dict[str, Held])
    laid_out: Journal = field(default_factory=Journal)
    applied: list[Applied] = field(default_factory=list[Applied])


def wrapped_model(model: nn.Module) -> nn.Module:
    """The model that carries a record: this one, or the one inside it (of a compiled, DDP or PEFT module)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got a {type(model).__name__}.")
    return next((module for module in model.modules() if RECORD in module.__dict__), model)


def record_of(model: nn.Module) -> Record:
    """The record on `model`, or on the model inside it; an empty one, not stored, if there is none."""
    return wrapped_model(model).__dict__.get(RECORD) or Record()


def held_by(model: nn.Module) -> dict[str, Held]:
    """The parameters of a model that are not plain dense ones, by the name they have when they are."""
    return dict(record_of(model).held)


def layout_of(model: nn.Module) -> Layout:
    """How the parameters of a model are to be held: while wrappers attach, the finished layout."""
    return record_of(model).layout


def standing(record: Record, model: nn.Module) -> list[bool]:
    """For each wrapper, whether all its changes still stand, or the user has changed one of them since.

    What a later wrapper has set over an earlier one's change leaves that standing.
    """
    below: dict[tuple[str, str], Any] = {}
    intact = [[edit.intact(model, below) for edit in reversed(one.journal.edits)] for one in reversed(record.applied)]
    return [all(edits) for edits in reversed(intact)]
