"""What the wrappers of a stack are to each other, read off their data: who holds which slot, and what conflicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .spec import Spec


def conflicts(stack: Sequence[Spec]) -> Iterator[str]:
    """Say in sentences why these wrappers cannot stand together."""
    for position, second in enumerate(stack):
        for first in stack[:position]:
            if first.name == second.name:
                yield (
                    f"{first!r} and {second!r}: the same wrapper twice with different options. "
                    f"Keep one; undo(model, {first.name}) takes off the one that is on the model."
                )
                continue
            for slot in sorted(set(first.claims) & set(second.claims) | set(first.yields) & set(second.yields)):
                yield f"{first!r} and {second!r} both claim {slot}. Keep one of them."
    for wrapper in stack:
        for other in stack:
            for trait in other.provides:
                if trait in wrapper.refuses:
                    yield f"{wrapper!r} refuses {trait}, set by {other!r}: {wrapper.refuses[trait]}"


def holders(stack: Sequence[Spec]) -> dict[str, Spec]:
    """The wrapper that holds each slot: one that claims it, else one that yields it, else the first default."""
    held: dict[str, Spec] = {}
    for kind in ("claims", "yields", "defaults"):
        for wrapper in stack:
            for slot in getattr(wrapper, kind):
                held.setdefault(slot, wrapper)
    return held


def stands_by_for(wrapper: Spec, stack: Sequence[Spec]) -> tuple[Spec, str] | None:
    """The wrapper that `wrapper` stands by for, and the slot that one holds; None if it is to do its work."""
    if wrapper.claims or not wrapper.yields:
        return None
    held = holders(stack)
    others = [(held[slot], slot) for slot in wrapper.yields]
    return None if any(other == wrapper for other, _ in others) else others[0]


def working(stack: Sequence[Spec]) -> list[Spec]:
    """The wrappers of a stack that do not stand by."""
    return [wrapper for wrapper in stack if stands_by_for(wrapper, stack) is None]
