"""What ranks that hold a model together have measured, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..distributed import ModelMesh
from .step import Step

Value = float | None


def over_ranks(step: Step, mesh: ModelMesh, device: torch.device) -> Step:
    """The step of all ranks of a mesh, each of which gives its own; all of them must ask for it.

    Ranks with tokens of their own have their own loads and losses; those that share tokens have the same.
    """
    apart = mesh.own_size
    load = [count for layer in step.load for count in layer]
    parts, collectives = list(step.parts), list(step.collectives)
    means = _mean(
        [
            *(step.tokens, step.tokens_per_second, step.loss),
            *(step.parts[part] for part in parts),
            *(step.collectives[name] for name in collectives),
            *step.sinks,
            *load,
        ],
        mesh,
        device,
    )
    tokens, rate, loss, *rest = means
    widths = [len(layer) for layer in step.load]
    memory = mesh.max(torch.tensor([step.memory, step.peak], dtype=torch.int64, device=device))
    taken = iter(rest)
    return replace(
        step,
        tokens=round((tokens or 0) * apart),
        tokens_per_second=None if rate is None else rate * apart,
        loss=loss,
        parts={part: next(taken) or 0.0 for part in parts},
        collectives={name: next(taken) or 0.0 for name in collectives},
        sinks=[next(taken) for _ in step.sinks],
        load=[[round((next(taken) or 0) * apart) for _ in range(width)] for width in widths],
        memory=int(memory[0]),
        peak=int(memory[1]),
    )


def _mean(values: Sequence[Value], mesh: ModelMesh, device: torch.device) -> list[Value]:
    """The mean of each value over the ranks that have it; None if none has."""
    there = [value is not None for value in values]
    both = torch.tensor([[value or 0.0 for value in values], there], dtype=torch.float64, device=device)
    totals, counts = mesh.sum(both).tolist()
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]
