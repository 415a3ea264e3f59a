"""Where the demo measures: in a process of its own for each model, and what can go wrong there in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from ..apart import Apart, ProcessDied, out_of_memory
from .comparison import Step


class DemoError(Exception):
    """The demo cannot run; the message is one sentence for the user."""


def steps_of(measure: Callable[..., Iterator[Step]], *args: Any, isolated: bool) -> Iterator[Step]:
    """Run `measure(*args)`, in one new process or here, and yield what it yields."""
    if not isolated:
        yield from measure(*args)
        return
    # Quiet: progress bars within the demo's own; errors come back as exceptions.
    with Apart(_stepping, measure, *args, quiet=True) as process:
        while steps := process.ask(1):
            yield from steps


def _stepping(measure: Callable[..., Iterator[Step]], *args: Any) -> Callable[[int], list[Step]]:
    """What a measuring process does: its model stays where it is, and only the next steps travel."""
    steps = measure(*args)
    return lambda number: list(islice(steps, number))


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Say in one sentence what a user can run into while the model at `path` is loaded and run."""
    try:
        yield
    except OSError as error:
        raise DemoError(f"cannot load or run {path!r}: {' '.join(str(error).split())}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, ProcessDied) or out_of_memory(error):
            raise DemoError("out of memory, or killed: use shorter --lengths or a smaller model.") from error
        raise
