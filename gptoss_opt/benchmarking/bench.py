"""`bench`: a checkpoint with its wrappers on this machine, beside transformers and beside the machine's limit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..checkpoint import Checkpoint, load
from ..core import Phase, Stack, Wrapper, compose
from ..planner import RELEASED_AT, Hardware, PlanError, detected, plan
from ..planner.memory import memory_of
from ..planner.target import Target, target_of
from ..planner.workload import Workload
from .contender import Contender
from .eager import eager_model
from .limits import limits_of
from .race import Runner, race
from .report import OURS, PEER, Benchmark, Measured


def bench(
    source: str | os.PathLike[str],
    stack: Stack | Wrapper | None = None,
    *,
    prompt: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
) -> Benchmark:
    """Measure a checkpoint with its wrappers on one device of this machine, beside transformers in eager attention.

    Both decode one sequence greedily, in bfloat16, in processes of their own that take turns; rates are those of the
    median turn. Nothing is timed that was not verified: every part of our model is compared with plain computations,
    as `verify` does, and its logits with those of transformers. What a machine allows at most is what `plan` counts of
    bytes and operations, over this machine's rates: on a CPU the best that are measured before each turn, of a GPU
    those of its data sheet.

    Args:
        source: a folder, a name on the Hugging Face hub, or "20b" or "120b" for the released ones.
        stack: our wrappers; those of the plan for one device, if left out.
        prompt: tokens of the prompt, which are random.
        new_tokens: how many tokens are decoded after the first new one.
        repeats: how many turns each takes.

    Returns:
        Tokens a second of decoding and of the prompt, ratios, parts of the limit, seconds to load, and the most
        memory above what the process held before; `right` says whether our model was found right. What does not fit
        beside ours, or runs out of memory, is said in words in place of figures.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        CompatibilityError: the wrappers cannot stand together, or not on this model.
        PlanError: our model does not fit this machine.
        ValueError: a size that cannot be, or wrappers that take several processes.
        TypeError: the source is a model: it must be loaded by processes of their own.

    Example:
        >>> found = bench(path, prompt=16, new_tokens=4, repeats=1)
        >>> found.right, found.ours.rates["decode"] > 0
        (True, True)
    """
    _check_sizes(prompt=prompt, new_tokens=new_tokens, repeats=repeats)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"bench was given a {type(source).__name__}, and loads a checkpoint in processes of their own. "
            "Give the folder or the name of one; save_pretrained writes one."
        )
    folder = Checkpoint.open(RELEASED_AT.get(os.fspath(source), source)).folder
    target, hardware = target_of(folder), replace(detected(), per_node=1, nodes=1)
    config, device = target.config, hardware.device
    if (length := prompt + new_tokens + 1) > (limit := config.max_position_embeddings):
        raise ValueError(
            f"prompt and new_tokens make {length:,} tokens, of {limit:,} that the model takes. Give fewer."
        )
    work = Workload(context=length)
    wrappers, memory_map = _chosen(target, stack, hardware, work)
    taken = memory_of(config, target.held(wrappers), wrappers, work, device).num_bytes
    absent = _why_not(taken, target.held(compose()).num_bytes, device.usable)

    def runner(name: str, loads: Callable[[], Any], absent: str | None = None) -> Runner:
        return Runner(name, Contender(loads, device.kind, prompt, new_tokens), absent)

    ours = runner(OURS, partial(load, folder, wrappers, device=device.kind, memory_map=memory_map))
    theirs = runner(PEER, partial(eager_model, folder, device=device.kind), absent)
    found = race(ours, theirs, folder, repeats, device)

    def limited(one: Measured, stack: Stack) -> Measured:
        hardware = Hardware(found.device)
        limits = limits_of(config, target.held(stack), hardware, prompt=prompt, new_tokens=new_tokens)
        return replace(one, limits=limits)

    name = f"gpt-oss, {config.num_hidden_layers} layers of {config.num_local_experts} experts"
    sizes, threads = f"{new_tokens:,} tokens after a prompt of {prompt:,}", f"{torch.get_num_threads()} threads"
    title = f"{name}: {sizes}, on {hardware}, {threads}"
    both = limited(ours.measured, wrappers), limited(theirs.measured, compose())
    return Benchmark(title, wrappers, *both, found.verification, found.agreement)


def _check_sizes(**sizes: int) -> None:
    for name, number in sizes.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} is {number!r}. Give a whole number from 1 up.")


def _chosen(target: Target, stack: Stack | Wrapper | None, hardware: Hardware, work: Workload) -> tuple[Stack, bool]:
    """Our wrappers, and whether weights are mapped from their files."""
    if stack is None:
        found = plan(target.source, hardware=hardware, context=work.context)
        if not found.fits:
            raise PlanError(" ".join([found.verdict, *found.notes]))
        return found.stack, found.memory_map
    wrappers = compose(stack)
    if spread := [wrapper.name for wrapper in wrappers if wrapper.phase == Phase.PARALLEL]:
        raise ValueError(f"bench measures one process, and {', '.join(spread)} takes several. Leave it out.")
    needed = memory_of(target.config, target.held(wrappers), wrappers, work, hardware.device).num_bytes
    if needed > (usable := hardware.device.usable):
        raise PlanError(
            f"{wrappers} does not fit: {needed / 1e9:,.1f} of {usable / 1e9:,.1f} GB. Leave it out for the plan's."
        )
    return wrappers, False


def _why_not(ours: int, dense: int, usable: int) -> str | None:
    """Why transformers' dense weights cannot be there beside our model, in words, if they cannot; all in bytes."""
    if ours + dense <= usable:
        return None
    return f"does not fit: {dense / 1e9:,.1f} GB beside ours, of {usable / 1e9:,.1f} GB"
