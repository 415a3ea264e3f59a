"""What the ranks of `benchmarks.parallel` do: hold the models, count their collectives, time their steps in turn."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from benchmarks.harness import forget_peak, median_ratio, resident
from gptoss_opt import compose, load, shard_experts, shard_tensor_parallel, with_fast_experts

RANKS = 2
PREFILL, TRAIN = 256, 128
STEPS = ("prefill", "decode", "train")
TOLERANCE = 0.05
POINTS = "points.json"

TRANSFORMERS = "transformers, experts"
STACKS = {
    "ours, experts": compose(shard_experts(), with_fast_experts()),
    "ours, experts and attention": compose(shard_experts(), shard_tensor_parallel(), with_fast_experts()),
}


def points_of_ranks(path: Path, repeats: int) -> list[dict[str, Any]]:
    """The points that the first of the ranks has, of the checkpoint at a path."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    spawn(on_rank, (store.port, path, repeats), nprocs=RANKS)
    points: list[dict[str, Any]] = json.loads((path / POINTS).read_text())
    return points


def on_rank(rank: int, port: int, path: Path, repeats: int) -> None:
    """Build the models on one rank and time their steps; the first rank writes the points."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = TCPStore("127.0.0.1", port, None, False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    models: dict[str, Any] = {}
    points: list[dict[str, Any]] = []
    for name in (TRANSFORMERS, *STACKS):
        before = forget_peak()
        models[name] = build(name, path)
        peak = resident("VmHWM") - before
        points.append({"case": "bytes", "model": name, **held(models[name]), "load_peak": peak})
    for kind in STEPS:
        for model in models.values():
            model.train(kind == "train")
        points += steps_of_kind(models, kind, repeats)
    if rank == 0:
        (path / POINTS).write_text(json.dumps(points))
    distributed.barrier()
    distributed.destroy_process_group()


def build(name: str, path: Path) -> Any:
    """A model on this rank, one way or the other."""
    torch.manual_seed(0)
    if name in STACKS:
        return load(path, STACKS[name])
    settings = DistributedConfig(tp_size=RANKS, ep_size=RANKS)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, distributed_config=settings)


def held(model: Any) -> dict[str, float]:
    """The bytes of this rank's parameters, and its share of all and of what can be split."""

    def mine(parameter: Any) -> int:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return int(local.nbytes)

    def whole(parameter: Any) -> int:
        return int(parameter.numel() * parameter.element_size())

    named = list(model.named_parameters())
    splittable = [p for name, p in named if not any(part in name for part in ("norm", "router", "o_proj.bias"))]
    return {
        "bytes": sum(mine(p) for _, p in named),
        "share": sum(mine(p) for _, p in named) / sum(whole(p) for _, p in named),
        "share_of_splittable": sum(map(mine, splittable)) / sum(map(whole, splittable)),
    }


def steps_of_kind(models: dict[str, Any], kind: str, repeats: int) -> list[dict[str, Any]]:
    """Traffic and times of one kind of step, in turn; ours also without sending anything."""
    runs = {name: step_of(model, kind) for name, model in models.items()}
    traffic, outputs = {}, {}
    for name, run in runs.items():
        with Counting() as counting:
            outputs[name] = run().float()
        traffic[name] = counting.traffic
    exact = outputs[TRANSFORMERS]
    for name, logits in outputs.items():
        # The median token counts: where two experts are nearly tied, rounding sends a token to the other.
        error = float(((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).median())
        assert error < TOLERANCE, f"{kind}: the logits of {name} are off by {error:.3f}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    silent: dict[str, list[float]] = {name: [] for name in STACKS}
    # The first turn warms up.
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(together(run))
            if name in silent:
                with alone():
                    silent[name].append(together(run))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    points: list[dict[str, Any]] = []
    for name, taken in times.items():
        ratio = median_ratio(taken[1:], times[TRANSFORMERS][1:])
        times_of = {"seconds": medians[name], "ratio_to_transformers": ratio}
        if name in silent:
            times_of["share_of_communication"] = 1 - statistics.median(silent[name][1:]) / medians[name]
        points.append({"case": kind, "model": name, **asdict(traffic[name]), **times_of})
    return points


def together(run: Callable[[], object]) -> float:
    """How long the slowest rank takes from a common start, in seconds."""
    distributed.barrier()
    begin = time.perf_counter()
    run()
    taken = torch.tensor(time.perf_counter() - begin)
    distributed.all_reduce(taken, distributed.ReduceOp.MAX)
    return float(taken)


def step_of(model: Any, kind: str) -> Callable[[], Tensor]:
    """One step: a prompt, one more token behind it, or forward and backward. It returns the logits."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (1, PREFILL), generator=random)
    given, options = tokens, {"use_cache": False}
    if kind == "decode":
        with torch.no_grad():
            cache = model(tokens, use_cache=True).past_key_values
        given, options = tokens[:, :1], {"past_key_values": cache, "use_cache": True}

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(given, **options).logits
        return logits

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        out = model(tokens[:, :TRAIN], labels=tokens[:, :TRAIN], use_cache=False)
        out.loss.backward()
        logits: Tensor = out.logits
        return logits.detach()

    return train if kind == "train" else forward


@dataclass
class Traffic:
    """The collectives of a step, and the bytes that one rank sends to others in them.

    By ring algorithms those are 2 (n - 1) / n of what it gives to an all-reduce and n - 1 times what it gives to an
    all-gather; of what it gives to an all-to-all, the parts for others.
    """

    all_reduces: int = 0
    all_gathers: int = 0
    all_to_alls: int = 0
    sent: float = 0.0


class Counting(TorchDispatchMode):
    """Counts collectives, whoever calls them: c10d's own, or the functional ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count(func._schema.name.split("::")[1].rstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def count(self, name: str, args: Any) -> None:
        ranks = distributed.get_world_size()
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if name in ("allreduce", "all_reduce"):
            self.traffic.all_reduces += 1
            self.traffic.sent += 2 * (ranks - 1) / ranks * tensors[0].nbytes
        elif name in ("allgather", "all_gather_into_tensor", "_allgather_base"):
            self.traffic.all_gathers += 1
            self.traffic.sent += (ranks - 1) * tensors[-1 if name != "all_gather_into_tensor" else 0].nbytes
        elif name in ("alltoall_base", "all_to_all_single"):
            given = tensors[-1]
            lists = [arg for arg in args if isinstance(arg, list | tuple) and len(arg) == ranks]
            own = lists[-1][distributed.get_rank()] / max(sum(lists[-1]), 1) if lists else 1 / ranks
            self.traffic.all_to_alls += 1
            self.traffic.sent += given.nbytes * (1 - own)
        elif name not in ("wait_tensor", "_wrap_tensor_autograd", "barrier"):
            raise NotImplementedError(name)


@contextmanager
def alone() -> Iterator[None]:
    """Meanwhile, nothing is sent: results are wrong, and the time is that of computation."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    real = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather")}
    for name in real:
        setattr(distributed, name, nothing)
    try:
        yield
    finally:
        for name, call in real.items():
            setattr(distributed, name, call)
