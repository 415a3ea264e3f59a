"""The errors a user can meet. Each message says what, why, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable


class CompatibilityError(ValueError):
    """A stack cannot be applied. Raised before anything is touched, with every problem at once.

    Attributes:
        problems: one sentence per problem.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "cannot apply this stack:" + "".join(f"\n  - {problem}" for problem in self.problems)


class BackendError(ValueError):
    """A backend was named that does not exist or cannot serve, or none can serve."""


class IrreversibleError(ValueError):
    """A wrapper was to be taken off that dropped data (a sharding), or holds what was not saved (trained adapters)."""
