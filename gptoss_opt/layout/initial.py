"""The first values of parameters that wrappers bring: seeded by their names, the same on all ranks in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .layout import Form
from .storage import Part, take


def _kaiming_uniform(values: Tensor, generator: torch.Generator) -> None:
    bound = values.shape[-1] ** -0.5
    values.uniform_(-bound, bound, generator=generator)


INITS: Mapping[str, Callable[[Tensor, torch.Generator], object]] = {
    "zeros": lambda values, _: values.zero_(),
    "ones": lambda values, _: values.fill_(1),
    "kaiming_uniform": _kaiming_uniform,
}
"""What `Layout.add` can begin with, by name."""


def first_values(parameter: str, form: Form, index: Mapping[int, Part]) -> Tensor:
    """The slice of a new parameter that a rank begins with, drawn in float32 on the CPU."""
    assert form.new is not None
    seed = int.from_bytes(hashlib.blake2b(parameter.encode(), digest_size=7).digest(), "big")
    whole = torch.empty(form.shape, dtype=torch.float32, device="cpu")
    INITS[form.new.init](whole, torch.Generator().manual_seed(seed))
    return take(whole, index).to(form.dtype).clone(memory_format=torch.contiguous_format)
