"""What the measurements of the demo share: the model, and the agreement of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import load
from ..benchmarking.eager import eager_model
from .comparison import Outcome, Settings

# Whether the greedy tokens must be the same, and how large the differences in `compare` may be (None: not judged).
# In 16 bits, rounding sends a token with nearly equal router scores to another expert, in eager as well. Such a token
# has other logits, so neither the largest difference nor the greedy tokens can be held to a bound; the median can.
TOLERANCES: dict[torch.dtype, tuple[bool, tuple[float | None, float, float | None]]] = {
    torch.float32: (True, (1e-4, 1e-5, 1e-3)),
    torch.bfloat16: (False, (None, 0.1, None)),
    torch.float16: (False, (None, 0.02, None)),
}

Outputs = tuple[Tensor, Tensor, Tensor]
"""Greedy tokens [N], logits [T, V], gradients of the sinks [layers * heads], empty if they are frozen."""


def load_model(settings: Settings, wrapper: Any = None) -> Any:
    """The model by `load` with a wrapper; without one as transformers loads it, in eager attention and trainable."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wrapper is not None:
        return load(settings.path, wrapper, device=device, dtype=getattr(torch, settings.dtype))
    return eager_model(settings.path, device=device, dtype=settings.dtype)


def verify(label: str, outputs: Outputs, file: Path, figures: dict[str, Any], lengths: Sequence[int] = ()) -> Outcome:
    """The figures, and how the outputs agree with those in `file`, which the first case writes."""
    if not file.exists():
        torch.save(outputs, file)
    agreement = compare(torch.load(file), outputs, lengths)
    return Outcome(figures | agreement.figures, tuple(f"{label}: {problem}" for problem in agreement.problems))


def compare(expected: Outputs, actual: Outputs, lengths: Sequence[int] = ()) -> Outcome:
    """How the outputs of one case agree with those of the first, and what is beyond the tolerance of their dtype.

    The same greedy tokens are those before the first that differs, in each sequence if there are several of these
    `lengths`. The logit difference is the largest absolute one; that of the sinks' gradients is relative, and None if
    they take none.
    """
    sequences = torch.split(expected[0] == actual[0], list(lengths or [len(actual[0])]))
    same = sum(int(sequence.cumprod(0).sum()) for sequence in sequences)
    positions = []
    # In pieces, as float32 copies of all logits of a large model would fill the memory.
    for want, have in zip(torch.split(expected[1], 256), torch.split(actual[1], 256), strict=True):
        difference = have.float() - want.float()
        ratio = difference.norm(dim=-1) / want.float().norm(dim=-1)
        positions.append(torch.stack((difference.abs().amax(-1), want.float().abs().amax(-1), ratio)))
    largest, highest = torch.cat(positions, dim=1)[:2].amax(1).tolist()
    median = torch.cat(positions, dim=1)[2].median().item()
    sinks = ((actual[2] - expected[2]).norm() / expected[2].norm()).item() if actual[2].numel() else None

    must_match, bounds = TOLERANCES[actual[1].dtype]
    judged = {
        "max logit difference / max logit": largest / highest,
        "the median relative logit difference": median,
        "the relative sink gradient difference": sinks,
    }
    problems = ["the greedy tokens differ."] if must_match and same < len(actual[0]) else []
    for (what, value), bound in zip(judged.items(), bounds, strict=True):
        # Written so that a NaN is a problem.
        if bound is not None and value is not None and not value <= bound:
            problems.append(f"{what} is {value:.1e}, above {bound:.0e}.")
    figures = {"same greedy tokens": (same, len(actual[0])), "max logit diff": largest, "sink grad diff": sinks}
    return Outcome(figures, tuple(problems))
