"""The ranks that verify a model together, so that none waits for another and all get one verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ..core import mesh_of
from ..distributed import ModelMesh, disagreements, exchanged, ranks_of
from .drift import Drift


class Stated(Protocol):
    """What says which of its facts must be the same on all ranks."""

    @property
    def statement(self) -> Mapping[str, str]:
        """Those facts, by name."""


Checked = TypeVar("Checked", bound=Stated)


@dataclass(frozen=True)
class VerifyingRanks:
    """The ranks that verify a model together: those that hold it, and its replicas.

    Attributes:
        mesh: the ranks that hold it; None if this process holds all of it, and verifies it alone.
    """

    mesh: ModelMesh | None

    @classmethod
    def of(cls, model: nn.Module) -> VerifyingRanks:
        """The ranks of a model."""
        return cls(mesh_of(model))

    @property
    def count(self) -> int:
        """How many they are."""
        return 1 if self.mesh is None else len(ranks_of(self.mesh.mesh))

    @property
    def is_first(self) -> bool:
        """Whether this is the first of them."""
        return self.mesh is None or self.mesh.is_first

    @property
    def dp_rank(self) -> int:
        """The number of the batch that this rank has: it is the same for ranks that share their tokens."""
        return 0 if self.mesh is None else self.mesh.dp_rank

    def hold(self, parameter: Tensor) -> bool:
        """Whether a parameter is spread over these ranks by our wrappers."""
        return self.mesh is not None and self.mesh.holds(parameter)

    def exchange(self, value: Any) -> list[Any]:
        """What each rank says, which JSON can hold; all of them must ask for it."""
        return [value] if self.mesh is None else list(exchanged(value, ranks_of(self.mesh.mesh)).values())

    def checked(self, check: Callable[[], Checked]) -> Checked:
        """What `check` gives.

        Raises `ValueError` on all ranks if they do not state the same, and on the others if it fails on one.
        """
        try:
            found = check()
        except Exception as error:  # whatever it is: the others are not to wait
            self._disagreements({}, [str(error)])
            raise
        if problems := self._disagreements(found.statement, []):
            raise ValueError("; ".join(problems))
        return found

    def _disagreements(self, statement: Mapping[str, str], problems: Sequence[str]) -> list[str]:
        return [] if self.mesh is None else disagreements(statement, problems, ranks_of(self.mesh.mesh))

    def agree_on_tokens(self, fingerprint: str) -> None:
        """Raise `ValueError` on all ranks if some that share their tokens have others than the rest."""
        batches: dict[int, set[str]] = {}
        for dp_rank, tokens in self.exchange([self.dp_rank, fingerprint]):
            batches.setdefault(dp_rank, set()).add(tokens)
        for tokens in batches.values():
            if len(tokens) > 1:
                raise ValueError(
                    f"ranks that compute the same tokens together were given others: {'; '.join(sorted(tokens))}. "
                    "Give them the same."
                )

    def worst(self, drifts: Sequence[Drift]) -> tuple[Drift, ...]:
        """Each drift as it is on the rank where it is worst."""
        said = self.exchange([vars(drift) for drift in drifts])
        everywhere = zip(*([Drift(**one) for one in each] for each in said), strict=True)
        return tuple(max(same, key=lambda drift: (not drift.right, drift.share)) for same in everywhere)
