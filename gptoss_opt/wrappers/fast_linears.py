"""`with_fast_linears`: linear layers of few rows at the memory's speed, on CPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..core import Attachment, Choice, Host, Phase, Report, Wrapper, check_name, choose, takes_model
from ..kernels.linear import BACKENDS
from ..model.host import GPT_OSS
from ..model.layers import set_layers
from ..model.linears import LINEARS, NORMS, linear_request, set_linears, why_no_linears


@dataclass(frozen=True, kw_only=True, repr=False)
class FastLinears(Wrapper):
    """What `with_fast_linears` builds. Options: `backend`."""

    backend: str = "auto"

    name: ClassVar[str] = "with_fast_linears"
    phase: ClassVar[Phase] = Phase.COMPUTE
    host: ClassVar[Host] = GPT_OSS
    claims: ClassVar[tuple[str, ...]] = (LINEARS, NORMS)

    def __post_init__(self) -> None:
        check_name(BACKENDS, self.backend, self.name)

    def check(self, model: nn.Module) -> Iterable[str]:
        return why_no_linears(model)

    def choice(self, model: nn.Module) -> Choice:
        return choose(BACKENDS, linear_request(model), self.backend, self.name)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        assert journal.choice is not None
        if journal.choice.backend == "torch":
            return Report(("nothing: torch's own products stay",))
        return Report((*set_linears(model, journal), *set_layers(model, journal)))


@takes_model
def with_fast_linears(*, backend: str = "auto") -> FastLinears:
    """Linear layers of attention, router and head, for few rows (decoding), at the speed of the memory, on CPUs.

    A decode step reads every weight once, and torch's products of few rows read them at less than the memory gives. On
    processors where the native product was measured to be faster it computes up to a number of rows, which `explain`
    names; the norms between them are computed natively too, in one pass. Beside native attention and packed experts,
    whole layers take one token of each sequence in three native calls. More rows stay torch's, and so does all that
    trains. Weights, checkpoint and adapters stay as they are.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a
            wrapper to give to `compose` or `load`.
        backend: "auto", or one by name, which then never falls back:
            "native": a library in C, in bfloat16 or float32, on processors where it was measured to be faster.
            "torch": torch's own products; nothing changes.

    Raises:
        CompatibilityError: not a GPT-OSS model, already compiled, or a backend that cannot serve here.
        BackendError: no backend has that name.

    Example:
        >>> model = with_fast_linears(model)
        >>> stack_of(model)
        compose(with_fast_linears())
    """
    return FastLinears(backend=backend)
