"""Where the demo measures: in a process of its own for each model, and what can go wrong there in one sentence."""

from __future__ import annotations

import io
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from .comparison import Step


class DemoError(Exception):
    """The demo cannot run; the message is one sentence for the user."""


# The generator of a measuring process: its model stays where it is, and only steps travel.
_steps: Iterator[Step] = iter(())


def steps_of(measure: Callable[..., Iterator[Step]], *args: Any, isolated: bool) -> Iterator[Step]:
    """Run `measure(*args)`, in one new process or here, and yield what it yields."""
    if not isolated:
        yield from measure(*args)
        return
    # Not forked: a copy of a process that has used torch's threads, or CUDA, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(measure, *args)) as pool:
        while steps := pool.submit(_next).result():
            yield from steps


def _begin(measure: Callable[..., Iterator[Step]], *args: Any) -> None:
    global _steps
    _steps = measure(*args)
    # Progress bars within the demo's own; errors come back as exceptions.
    sys.stderr = io.StringIO()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _next() -> list[Step]:
    return list(islice(_steps, 1))


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Say in one sentence what a user can run into while the model at `path` is loaded and run."""
    try:
        yield
    except OSError as error:
        raise DemoError(f"cannot load or run {path!r}: {' '.join(str(error).split())}") from error
    except (MemoryError, RuntimeError) as error:
        known = (MemoryError, torch.OutOfMemoryError, BrokenProcessPool)
        # A batcher says it in words of its own.
        if isinstance(error, known) or any(name in str(error) for name in ("DefaultCPUAllocator", "OutOfMemoryError")):
            raise DemoError("out of memory, or killed: use shorter --lengths or a smaller model.") from error
        raise
