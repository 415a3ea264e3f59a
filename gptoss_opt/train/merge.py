"""Folding adapters into the weights beside which they were trained."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..core import undo
from ..core.record import wrapped_model
from ..model.adapters import adapters_on
from ..table import Table
from .fold import Exactness, Folded, changes_of, refuse_fsdp

LOST, SMALL = 3.0, 1e-3
"""A change of which less is left, in dB, counts as lost: half of its energy, or more, is missing. One that has less
than this part of the energy of all changes is not looked at."""


@dataclass(frozen=True)
class MergeReport:
    """How exact each weight is after a merge; prints as a table, and shows as HTML in a notebook.

    Attributes:
        weights: by the name of the weight.
    """

    weights: dict[str, Exactness]

    @property
    def lost(self) -> dict[str, Exactness]:
        """The weights whose change rounded away for the greater part, if it is not next to nothing in the whole."""
        least = SMALL * sum(found.change for found in self.weights.values())
        return {name: one for name, one in self.weights.items() if one.change > least and one.change_sqnr < LOST}

    @property
    def table(self) -> Table:
        """A row for each weight."""
        rows = [(name, _said(found.sqnr), _said(found.change_sqnr)) for name, found in self.weights.items()]
        return Table(("weight", "SQNR", "SQNR of its change"), rows)

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(f'{len(self.weights)} weights merged')}</p>{self.table._repr_html_()}"


def _said(decibels: float) -> str:
    return f"{decibels:.1f} dB" if abs(decibels) < float("inf") else "exact" if decibels > 0 else "lost"


def tried(model: nn.Module, storages: Mapping[str, str], dtype: torch.dtype | None) -> MergeReport:
    """How exact weights with adapters will be in these storages, dense ones in a dtype, by default their own."""
    found, changes = {}, changes_of(model)
    for name, change in tqdm(changes.items(), "trying the merge", unit="weight", delay=2, leave=False):
        weight = Folded(model, name, change)
        found[name] = weight.exactness(weight.stored(storages[name], dtype or weight.dtype), storages[name])
    return MergeReport(found)


def refuse_loss(report: MergeReport, otherwise: str) -> None:
    """Raise `ValueError`, with the numbers, if changes would be lost."""
    lost = sorted(report.lost.items(), key=lambda one: one[1].change_sqnr)
    if lost:
        shown = ", ".join(f"{name} {found.change_sqnr:.1f} dB" for name, found in lost[:3])
        raise ValueError(
            f"the change of {len(lost)} of {len(report.weights)} weights would round away; of it is left, as "
            f"signal-to-noise ratio: {shown}. Keep the adapter apart (save_adapter), or merge into weights of more "
            f"precision: bf16 instead of packed ones, float32 instead of bfloat16. {otherwise} does it even so."
        )


@torch.no_grad()
def merge_lora(model: nn.Module, *, lossy: bool = False) -> MergeReport:
    """Fold the adapters on a model into its weights, and take `with_lora` off.

    A dense weight becomes `W + scale * B A`, rounded to its dtype. A packed one is quantised anew where the adapter
    changes it, and stays as it is, bit for bit, elsewhere. MXFP4 has about one digit: a small change rounds away. So
    the merge is tried first, and refused where less than half of a change's energy would arrive.

    Args:
        model: a model with `with_lora`, or a module around one; on each of the ranks that hold it together.
        lossy: merge even so.

    Returns:
        The signal-to-quantisation-noise ratio of each merged weight, and of its change alone.

    Raises:
        ValueError: there are no adapters on the model, or changes would be lost, with the numbers. Nothing is changed.

    Example:
        >>> model = with_lora(model, targets="q_proj")
        >>> list(merge_lora(model).weights)[:2]
        ['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight']
        >>> len(stack_of(model))
        0
    """
    inner = wrapped_model(model)
    refuse_fsdp(inner)
    lora = adapters_on(inner).wrapper
    changes = changes_of(inner)
    report = tried(inner, {name: Folded(inner, name, None).storage for name in changes}, None)
    if not lossy:
        refuse_loss(report, "merge_lora(model, lossy=True)")
    for name, change in tqdm(changes.items(), "merging", unit="weight", delay=2, leave=False):
        weight = Folded(inner, name, change)
        for suffix, values in weight.stored(weight.storage, weight.dtype).items():
            weight.tensors[suffix].copy_(values)
        # From here on the weight holds what the adapter added, wherever this is interrupted.
        change.low_rank.b.zero_()
    undo(inner, lora.name, discard=True)
    return report
