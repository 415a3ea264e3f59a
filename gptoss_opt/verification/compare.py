"""What a part gives beside its plain computation: forward, and the gradient of what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..model.attention import KEY
from ..model.implementations import IMPLEMENTATION
from .drift import Drift, epsilon, share_of
from .probe import implementation

Plain = Callable[[Tensor], Tensor]
"""A plain computation of a part: from what it is given, in any dtype, to what it gives in that one."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the exact result is computed."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


@torch.no_grad()
def compared(
    part: str, layer: int | None, backend: str, kind: str, found: Tensor, given: Tensor, plain: Plain
) -> Drift:
    """What a part has given, beside what it should for what it was given."""
    exact, low = plain(given.to(wide(given.dtype))), plain(given)
    return Drift(part, layer, backend, kind, *share_of(found, low, exact, epsilon(found.dtype)))


def differentiated(part: str, layer: int, backend: str, ours: Plain, given: Tensor, plain: Plain) -> Drift:
    """The gradient of what a part is given, of a random gradient of what it gives."""
    d_out: Tensor | None = None

    def gradient(compute: Plain, dtype: torch.dtype) -> Tensor:
        nonlocal d_out
        leaf = given.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            out = compute(leaf)
            if d_out is None:
                d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
            return torch.autograd.grad(out, leaf, d_out.to(out.dtype))[0]

    found, low = gradient(ours, given.dtype), gradient(plain, given.dtype)
    exact = gradient(plain, wide(given.dtype))
    return Drift(part, layer, backend, "gradient", *share_of(found, low, exact, epsilon(given.dtype)))


def by_others(
    part: str, layer: int, config: Any, others: list[str], ours: Plain, given: Tensor, plain: Plain, gradients: bool
) -> Iterator[Drift]:
    """What other backends give, each of which the config names meanwhile."""
    for name in others:
        with implementation(config, IMPLEMENTATION[part], KEY.format(name)):
            with torch.no_grad():
                found = ours(given)
            yield compared(part, layer, name, "forward", found, given, plain)
            if gradients:
                yield differentiated(part, layer, name, ours, given, plain)
