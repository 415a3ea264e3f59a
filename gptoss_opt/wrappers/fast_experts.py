"""`with_fast_experts`: dense experts as one grouped product per projection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..core import Attachment, Choice, Host, Phase, Report, Wrapper, check_name, choose, takes_model
from ..kernels.experts import DENSE_BACKENDS
from ..model.experts import EXPERTS, experts_request, fill_experts, why_no_experts
from ..model.host import GPT_OSS


@dataclass(frozen=True, kw_only=True, repr=False)
class FastExperts(Wrapper):
    """What `with_fast_experts` builds. Options: `backend`."""

    backend: str = "auto"

    name: ClassVar[str] = "with_fast_experts"
    phase: ClassVar[Phase] = Phase.COMPUTE
    host: ClassVar[Host] = GPT_OSS
    yields: ClassVar[tuple[str, ...]] = (EXPERTS,)

    def __post_init__(self) -> None:
        check_name(DENSE_BACKENDS, self.backend, self.name)

    def check(self, model: nn.Module) -> Iterable[str]:
        return why_no_experts(model)

    def choice(self, model: nn.Module) -> Choice:
        return choose(DENSE_BACKENDS, experts_request(model), self.backend, self.name)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        return Report(fill_experts(model, journal))


@takes_model
def with_fast_experts(*, backend: str = "auto") -> FastExperts:
    """Dense experts, grouped: tokens sorted by expert, one grouped product per projection, one weighted sum.

    Keeps weights, checkpoint and `generate` as they are; gradients reach everything. Any number of tokens, always in
    one order of summation, and without waiting for the GPU. On one model with `with_mxfp4_experts`, which brings its
    own computation, it stands by and changes nothing; it takes over when that one is undone.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a
            wrapper to give to `compose` or `load`.
        backend: "auto", or one by name, which then never falls back:
            "native": CPU with AVX-512 BF16 on which it was measured to be faster, a library in C; bfloat16.
            "torch": torch's grouped_mm, CPU and CUDA, and the activation in one pass.
            "reference": plain torch, one expert after the other; defines the semantics, runs everywhere.

    Raises:
        CompatibilityError: not a GPT-OSS model, already compiled, or a backend that cannot serve here.
        BackendError: no backend has that name.

    Example:
        >>> model = with_fast_experts(model)
        >>> explain(model).rows[0].backend
        'torch'
    """
    return FastExperts(backend=backend)
