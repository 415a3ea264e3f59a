"""How far a result is from the exact one, beside how far a plain computation in the same dtype is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]


def _rms(x: Tensor) -> Tensor:
    return x.pow(2).mean().sqrt()


def _rms_of_features(x: Tensor) -> Tensor:
    return x.flatten(0, -2).pow(2).mean(0).sqrt().amax()


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax()


NORMS: dict[str, tuple[Norm, float]] = {
    "RMS": (_rms, 2),
    "worst feature": (_rms_of_features, 3),
    "worst value": (_largest, 4),
}
"""What is compared, and how many times the error of the plain computation is allowed."""


@dataclass(frozen=True)
class Drift:
    """One part of the model by one backend.

    Attributes:
        part: "norm", "attention", "router", "router's weights", "router's choice", "experts", "embedding",
            "rotary embedding" or "head".
        layer: its number; None for what is in no layer.
        backend: what computed it.
        kind: "forward", "gradient" or "decoding".
        share: the error as a part of what is allowed, by the worst of the norms; above 1 it is wrong.
        norm: that norm.
    """

    part: str
    layer: int | None
    backend: str
    kind: str
    share: float
    norm: str

    @property
    def right(self) -> bool:
        """Whether the error is within what is allowed."""
        return self.share <= 1  # and not where it is no number

    @property
    def where(self) -> str:
        """The part in words."""
        at = f"the {self.part}" if self.layer is None else f"{self.part} of layer {self.layer}"
        return f"{at} by {self.backend}" if self.kind == "forward" else f"{at} by {self.backend} ({self.kind})"


def share_of(found: Tensor, plain: Tensor, exact: Tensor, eps: float) -> tuple[float, str]:
    """The error of `found` as a part of what is allowed, and by which norm it is largest.

    Allowed is a multiple of the error of `plain`, the same computed plainly in the same dtype, and of a rounding.

    Example:
        >>> exact = torch.linspace(-1, 1, 64, dtype=torch.float64).view(4, 16)
        >>> shares = [share_of(exact * by, exact.float(), exact, 2**-23)[0] for by in (1, 1 + 2**-24, 1.01)]
        >>> [share <= 1 for share in shares]
        [True, True, False]
    """
    if not bool(found.isfinite().all()):
        return float("inf"), "not a number"
    # In float64 the plain computation is the exact one: sums in another order are off by more than one rounding.
    eps *= 64 if found.dtype == torch.float64 else 1
    found, plain = found.to(exact.dtype), plain.to(exact.dtype)
    shares = {
        name: float(norm(found - exact)) / (times * float(norm(plain - exact) + eps * norm(exact)) or eps)
        for name, (norm, times) in NORMS.items()
    }
    worst = max(shares, key=lambda name: shares[name])
    return shares[worst], worst


def epsilon(dtype: torch.dtype) -> float:
    """The rounding of a dtype."""
    return torch.finfo(dtype).eps
