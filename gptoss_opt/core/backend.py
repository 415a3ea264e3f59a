"""Choosing one implementation of a kernel out of a literal tuple in order of preference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import BackendError


class Backend(Protocol):
    """One implementation of one kernel.

    Attributes:
        name: what a user writes as `backend=...`.
        only_named: never chosen by `"auto"`.
    """

    @property
    def name(self) -> str: ...
    @property
    def only_named(self) -> bool: ...
    def why_not(self, request: Any) -> str | None:
        """The reason why this backend cannot serve `request`, or None if it can."""
        ...


@dataclass(frozen=True)
class Choice:
    """The backend chosen, and each one that was preferred to it or left aside, with the reason."""

    backend: str
    rejected: tuple[tuple[str, str], ...] = ()


def check_name(backends: Sequence[Backend], name: str, what: str) -> None:
    """Raise `BackendError` unless `name` is `"auto"` or one of `backends`."""
    names = ["auto", *(backend.name for backend in backends)]
    if name not in names:
        raise BackendError(f"{what}: there is no backend {name!r}. Use one of {', '.join(map(repr, names))}.")


def choose(backends: Sequence[Backend], request: Any, name: str, what: str) -> Choice:
    """The backend to serve `request`: the named one, or the first that can.

    A named backend never falls back: if it cannot serve, `BackendError` says why.
    """
    check_name(backends, name, what)
    reasons = {backend.name: backend.why_not(request) for backend in backends}
    if name != "auto":
        if reasons[name] is not None:
            raise BackendError(f"backend {name!r} cannot serve here: {reasons[name]}. Use backend='auto'.")
        others = ((other, reason or f"{name!r} was named") for other, reason in reasons.items() if other != name)
        return Choice(name, tuple(others))
    rejected: list[tuple[str, str]] = []
    chosen: str | None = None
    for backend in backends:
        reason = reasons[backend.name] or ("only used when named" if backend.only_named else None)
        if reason is None and chosen is None:
            chosen = backend.name
        else:
            rejected.append((backend.name, reason or f"{chosen!r} comes first"))
    if chosen is None:
        lines = "; ".join(f"{other}: {reason}" for other, reason in rejected)
        raise BackendError(f"no backend can serve here ({lines}).")
    return Choice(chosen, tuple(rejected))
