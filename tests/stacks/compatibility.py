"""The table of docs/compatibility.md, from what wrappers say of themselves: python -m tests.stacks.compatibility."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import gptoss_opt
from gptoss_opt import Wrapper
from gptoss_opt.core import WRAPPERS
from gptoss_opt.core.resolve import canonical
from gptoss_opt.core.slots import conflicts, stands_by_for
from tests.helpers import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
HEAD = """\
# Which wrappers stand together

This table is generated from what each wrapper says of itself: the slots that it claims, yields or fills by default, the
traits that it provides and refuses, and the layout that it asks for. Tests attach every pair that it calls good, in
both orders, and compare the logits; what it calls a conflict must be refused. The order of calls never matters.

"""


def relation(first: Wrapper, second: Wrapper) -> str:
    """What two wrappers are to each other, in words."""
    stack = canonical((first, second))
    if problems := list(conflicts(stack)):
        return f"conflict: {' '.join(problems)}"
    by = {one: holder[1] for one in stack if (holder := stands_by_for(one, stack))}
    standing = [f"`{one.name}` stands by: the other holds {slot}" for one, slot in by.items()]
    leaving = [] if by else [f"`{name}` leaves {what} to the other" for name, what in given_way(stack)]
    return "; ".join(["together", *standing, *leaving])


def given_way(stack: tuple[Any, ...]) -> list[tuple[str, str]]:
    """Who asks for splits that do not hold beside the others', and of which parameters, on two neighbouring ranks."""
    spread = tuple(type(one)(degree=2) if "degree" in one.options() else one for one in stack)
    layout = gptoss_opt.compose(*spread).layout(tiny_model())
    found = {
        (split.by.partition("(")[0], "the experts" if ".experts." in name else name)
        for name, form in layout.asked.items()
        for split in form.splits
        if split not in layout.form(name).splits
    }
    return sorted(found)


def public() -> list[Wrapper]:
    """Every public wrapper, with its default options."""
    return [getattr(gptoss_opt, name)() for name in sorted(WRAPPERS) if hasattr(gptoss_opt, name)]


def page() -> str:
    """The whole page."""
    rows = [(f"`{a.name}`", f"`{b.name}`", relation(a, b)) for a, b in combinations(public(), 2)]
    lines = ["| | | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    slots = ["| wrapper | claims | yields | by default | provides | refuses |", "|---|---|---|---|---|---|"]
    for one in public():
        kinds = (one.claims, one.yields, one.defaults, one.provides, one.refuses)
        slots.append(f"| `{one.name}` | {' | '.join(', '.join(kind) for kind in kinds)} |")
    return HEAD + "\n".join(lines) + "\n\n## What each says of itself\n\n" + "\n".join(slots) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
