"""What the wrappers of a stack are to each other, read off their data: in conflict, or one standing by for another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .wrapper import Wrapper


def conflicts(stack: list[Wrapper]) -> Iterator[str]:
    """Why these wrappers cannot stand together, as sentences."""
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


def holder_of(wrapper: Wrapper, stack: Iterable[Wrapper]) -> tuple[Wrapper, str] | None:
    """The wrapper that `wrapper` stands by for, and the slot it holds; None if it is to do its work."""
    held = ((other, slot) for other in stack for slot in wrapper.yields if slot in other.claims)
    return next(held, None)
