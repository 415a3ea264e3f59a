"""`run_demo`: all comparisons on one model, with a progress bar."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import CheckpointError, HardwareError, Stack, plan, with_mxfp4_experts
from ..checkpoint import Checkpoint
from ..layout import LayoutError
from ..testing import Size, random_checkpoint
from .comparison import Comparison, DemoReport, Outcome, Settings
from .isolate import DemoError, explained, steps_of
from .tables import COMPARISONS, WIDE


def run_demo(
    model: str | None = None,
    *,
    lengths: Sequence[int] = (1024, 2048),
    new_tokens: int = 16,
    dtype: str | None = None,
    threads: int | None = None,
    ranks: int | None = None,
    size: str = "small",
    wide: Size | None = WIDE,
    comparisons: Sequence[Comparison] = COMPARISONS,
    isolated: bool = True,
) -> DemoReport:
    """Generate and train a step with every stack, decode with experts held in each way, serve, fine-tune, and compare.

    Args:
        model: a folder or a hub id; None writes random checkpoints and removes them afterwards.
        lengths: prompt lengths in tokens.
        new_tokens: how many tokens to generate, greedily.
        dtype: to load the weights in; None is "float32" for the random checkpoint, else "auto", the dtype of the file.
            The tables of decoding and serving are in float32 if that is asked for, else in bfloat16; that of
            fine-tuning is in float32 for the random checkpoint as well, unless another dtype is asked for.
        threads: CPU threads; None leaves that to torch.
        ranks: shard the model over so many processes too, in float32 unless another dtype is asked for.
        size: of the random checkpoint.
        wide: the size of the random checkpoint for decoding and serving; None takes the first one again.
        comparisons: the tables to measure; those without cases are left out.
        isolated: measure each stack in a process of its own. Without, memory is less exact.

    Raises:
        DemoError: the model cannot be loaded, is not a GPT-OSS model, does not fit into memory, or does not divide over
            the ranks.

    Example:
        >>> report = run_demo(size="tiny", wide=None, lengths=[16], new_tokens=2, isolated=False)
        >>> report.problems
        ()
    """
    if not lengths or not any(comparison.cases for comparison in comparisons):
        raise ValueError("the demo needs at least one length and one row.")
    # In growing order, so that memory the allocator keeps from a shorter run never exceeds the peak of a longer one.
    lengths = sorted(set(lengths))
    with tempfile.TemporaryDirectory(prefix="gptoss_opt-demo-") as scratch:
        path = model or str(random_checkpoint(Path(scratch, "checkpoint"), size))
        packed = check_model(path, lengths[-1], ranks)
        chosen = list(_possible(comparisons, packed, ranks))
        name = model or f"random checkpoint, size {size!r}"
        checkpoints = {False: (name, path), True: (name, path)}
        if model is None and wide is not None and any(comparison.wide for comparison in chosen):
            name = "one layer as wide as gpt-oss-20b's, 8 experts" if wide is WIDE else name
            checkpoints[True] = name, str(random_checkpoint(Path(scratch, "wide"), wide))
        found = []
        total = sum(len(one.cases) * (1 + len(lengths) if one.per_length else 1) for one in chosen)
        with tqdm(total=total, bar_format="{desc:<53}{bar}| {n_fmt}/{total_fmt} {elapsed}") as bar:
            for one in chosen:
                asked = dtype or ("auto" if model else None)
                own = one.dtype(asked) if one.dtype else asked or "float32"
                folder = Path(tempfile.mkdtemp(dir=scratch))
                settings = Settings(*checkpoints[one.wide], own, new_tokens, lengths, threads, ranks, folder)
                found.append((replace(one, outcomes=tuple(_outcomes(one, settings, isolated, bar))), vars(settings)))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"device": device, "threads": threads or torch.get_num_threads()}
    tables = tuple(replace(one, title=one.title.format(**settings | facts)) for one, settings in found)
    return DemoReport(tables, _planned(model or "20b"))


def _planned(model: str) -> str:
    """The plan of a model for this machine, which ends with its code."""
    try:
        return f"The plan for this machine:\n\n{plan(model)}"
    except (HardwareError, LayoutError) as error:
        return f"There is no plan for this machine: {error}"


def check_model(path: str, max_length: int, ranks: int | None) -> bool:
    """Whether the experts of the checkpoint are packed.

    Raises:
        DemoError: this is no sound GPT-OSS checkpoint, or it does not take so many tokens or divide over so many ranks.
    """
    try:
        config = Checkpoint.open(path).config
    except CheckpointError as error:
        raise DemoError(str(error)) from error
    if max_length > config.max_position_embeddings:
        raise DemoError(f"{path!r} takes {config.max_position_embeddings} tokens at most, not {max_length}.")
    heads = config.num_key_value_heads
    if ranks and heads % ranks:
        raise DemoError(f"the {heads} key/value heads of {path!r} do not divide over {ranks} ranks.")
    return getattr(config, "quantization_config", None) is not None


def _possible(comparisons: Sequence[Comparison], packed: bool, ranks: int | None) -> Iterator[Comparison]:
    for comparison in comparisons:
        # To pack dense weights is lossy.
        cases = tuple(case for case in comparison.cases if packed or not _packs(case.wrap))
        if cases and (ranks or not comparison.on_ranks):
            yield replace(comparison, cases=cases)


def _packs(wrap: Any) -> bool:
    return with_mxfp4_experts() in (wrap if isinstance(wrap, Stack) else (wrap,))


def _outcomes(comparison: Comparison, settings: Settings, isolated: bool, bar: Any) -> Iterator[Outcome]:
    isolated = isolated and not comparison.on_ranks
    for _, cases in groupby(comparison.cases, lambda case: case.wrap):
        with explained(settings.path):
            for step in steps_of(comparison.measure, tuple(cases), settings, isolated=isolated):
                if isinstance(step, str):
                    bar.set_description_str(step)
                    continue
                bar.update()
                if step is not None:
                    yield step
