"""Sharded models: bytes per rank, collectives per token, time beside transformers' expert parallelism.

    python -m benchmarks.parallel [--layers N] [--repeats N]

Two processes with one thread each, on Gloo. What scales is counted; times are of this machine only. On a machine with
several GPUs the same ranks use NCCL; Gloo on CUDA tensors would be a smoke test, and is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from benchmarks.harness import record, resident, table
from benchmarks.step_model import GPUS, RELEASED, Step, bytes_held, counts_of, step_time
from gptoss_opt import balance_experts, compose, load, shard_experts, shard_tensor_parallel, with_fast_experts
from gptoss_opt.distributed import collectives, split

RANKS = 2
PREFILL, TRAIN = 256, 128
SHARE = 0.51
TIME_RATIO = 1.0
TOLERANCE = 0.05
POINTS = "points.json"
DEGREES = (1, 2, 4, 8)
LARGEST, SLACK = 16 * 2880 * 5760 * 2 // RANKS, 64 << 20
"""A tensor, and what a process takes besides, when a shard is loaded."""


def config(layers: int) -> GptOssConfig:
    """As wide as the 20b, with half of its experts and a smaller vocabulary."""
    return GptOssConfig(
        num_hidden_layers=layers,
        hidden_size=2880,
        intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=16,
        num_experts_per_tok=4,
        vocab_size=16384,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


def checkpoint(folder: Path, layers: int) -> None:
    """A random dense checkpoint in bfloat16."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GptOssForCausalLM(config(layers)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02) if "norm" not in name else torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)


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
        super().__init__()
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
        setattr(collectives.distributed, name, nothing)
    try:
        yield
    finally:
        for name, call in real.items():
            setattr(collectives.distributed, name, call)


STEPS = ("prefill", "decode", "train")


def step_of(model: Any, kind: str) -> Callable[[], Tensor]:
    """One step: a prompt, one more token behind it, or forward and backward."""
    tokens = torch.randint(3, 16384, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    if kind == "train":

        def train() -> Tensor:
            model.zero_grad(set_to_none=True)
            out = model(tokens[:, :TRAIN], labels=tokens[:, :TRAIN], use_cache=False)
            out.loss.backward()
            return out.logits.detach()

        return train
    if kind == "prefill":

        @torch.no_grad()
        def prefill() -> Tensor:
            return model(tokens, use_cache=False).logits

        return prefill
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values

    @torch.no_grad()
    def decode() -> Tensor:
        return model(tokens[:, :1], past_key_values=cache, use_cache=True).logits

    return decode


def build(name: str, path: Path) -> Any:
    """A model on this rank, one way or the other."""
    torch.manual_seed(0)
    if name == "transformers, experts":
        settings = DistributedConfig(tp_size=RANKS, ep_size=RANKS)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, distributed_config=settings)
    stacks = {
        "ours, experts": compose(shard_experts(), with_fast_experts()),
        "ours, experts and attention": compose(shard_experts(), shard_tensor_parallel(), with_fast_experts()),
    }
    return load(path, stacks[name])


NAMES = ("transformers, experts", "ours, experts", "ours, experts and attention")


def on_rank(rank: int, port: int, path: Path, repeats: int) -> None:
    """All of it on one rank; the first writes the points."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = distributed.TCPStore("127.0.0.1", port, None, False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    models: dict[str, Any] = {}
    points: list[dict[str, Any]] = []
    for name in NAMES:
        before = forget_peak()
        models[name] = build(name, path)
        peak = resident("VmHWM") - before
        bytes_held_here = held(models[name])
        points.append({"case": "bytes", "model": name, **bytes_held_here, "load_peak": peak})
    for kind in STEPS:
        for model in models.values():
            model.train(kind == "train")
        points += steps_of_kind(models, kind, repeats)
    if rank == 0:
        (path / POINTS).write_text(json.dumps(points))
    distributed.barrier()
    distributed.destroy_process_group()


def forget_peak() -> int:
    """Make the system forget the most memory that this process had, and return what it has now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


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
    """Traffic and times of one kind of step, in turn."""
    runs = {name: step_of(model, kind) for name, model in models.items()}
    traffic, outputs = {}, {}
    for name, run in runs.items():
        with Counting() as counting:
            outputs[name] = run()
        traffic[name] = counting.traffic
    exact = outputs[NAMES[0]].float()
    for name, logits in outputs.items():
        # Of the median token: where two experts are nearly tied, rounding sends a token to the other.
        error = float(((logits.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).median())
        assert error < TOLERANCE, f"{kind}: the logits of {name} are off by {error:.3f}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    silent: dict[str, list[float]] = {name: [] for name in runs if name.startswith("ours")}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = together(run)
            if name in silent:
                with alone():
                    quiet = together(run)
            if turn:
                times[name].append(taken)
                if name in silent:
                    silent[name].append(quiet)
    base = times[NAMES[0]]
    return [
        {
            "case": kind,
            "model": name,
            **asdict(traffic[name]),
            "seconds": statistics.median(taken),
            "ratio_to_transformers": statistics.median(a / b for a, b in zip(taken, base, strict=True)),
            **(
                {"share_of_communication": 1 - statistics.median(silent[name]) / statistics.median(taken)}
                if name in silent
                else {}
            ),
        }
        for name, taken in times.items()
    ]


def together(run: Callable[[], object]) -> float:
    """How long the slowest rank takes from a common start, in seconds."""
    distributed.barrier()
    begin = time.perf_counter()
    run()
    taken = torch.tensor(time.perf_counter() - begin)
    distributed.all_reduce(taken, distributed.ReduceOp.MAX)
    return float(taken)


def imbalance() -> list[dict[str, Any]]:
    """How full the fullest rank is, of the mean, under a load that falls off as one over the rank of the expert."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, 33, dtype=torch.float64)
    load = [weights[torch.randperm(32, generator=generator)].tolist() for _ in range(24)]
    points = []
    for degree in DEGREES[1:]:
        contiguous = [tuple(tuple(part) for part in split(32, degree))] * 24
        bound = max(1.0, max(weights).item() / (sum(weights).item() / degree))
        for name, placement in (("contiguous", contiguous), ("balanced", balance_experts(load, degree))):
            layers = zip(load, placement, strict=True)
            worst = [fullest(layer, ranks) for layer, ranks in layers]
            fields = {"degree": degree, "placement": name, "fullest": statistics.mean(worst), "bound": bound}
            points.append({"case": "imbalance", **fields})
    return points


def fullest(load: Sequence[float], placement: Sequence[Sequence[int]]) -> float:
    """The load of the fullest rank, of the mean."""
    return max(sum(load[e] for e in experts) for experts in placement) / (sum(load) / len(placement))


def modelled() -> list[dict[str, Any]]:
    """Decoding on 1 to 8 GPUs by the model of the step time."""
    cases = itertools.product(RELEASED, GPUS, DEGREES, (1, 64))
    return [
        {
            "case": "modelled",
            "size": size,
            "gpu": gpu.name,
            "degree": degree,
            "batch": batch,
            **step_time(RELEASED[size], gpu, Step(degree, batch, packed=True)),
        }
        for size, gpu, degree, batch in cases
    ]


def memory_table() -> list[dict[str, Any]]:
    """The parameters of the released models on the fullest of 1 to 8 ranks, by the layout."""
    cases = itertools.product(RELEASED, (True, False), DEGREES)
    return [
        {
            "case": "memory",
            "size": size,
            "packed": packed,
            "degree": degree,
            "bytes": bytes_held(RELEASED[size], degree, packed=packed),
        }
        for size, packed, degree in cases
    ]


def check(points: list[dict[str, Any]], settings: GptOssConfig) -> list[str]:
    """What of the targets is not reached, and where the model of the step counts otherwise than was measured."""
    found = {(point["case"], point["model"]): point for point in points if "model" in point}
    missed = []
    for name in NAMES[1:]:
        point = found["bytes", name]
        if point["load_peak"] > point["bytes"] + LARGEST + SLACK:
            missed.append(f"loading {name} took {point['load_peak'] / 1e6:.0f} MB, to hold {point['bytes'] / 1e6:.0f}")
    share = found["bytes", NAMES[2]]["share_of_splittable"]
    if share > SHARE:
        missed.append(f"each rank holds {share:.3f} of what can be split, not {SHARE}")
    for kind in STEPS:
        theirs, ours = found[kind, NAMES[0]]["sent"], found[kind, NAMES[1]]["sent"]
        if ours > theirs:
            missed.append(f"{kind}: {NAMES[1]} sends {ours:.0f} bytes, transformers {theirs:.0f}")
    ratios = {(kind, name): found[kind, name]["ratio_to_transformers"] for kind in STEPS for name in NAMES[1:]}
    slow = {case: ratio for case, ratio in ratios.items() if ratio > TIME_RATIO}
    missed += [f"{kind}: {name} takes {ratio:.2f}x the time" for (kind, name), ratio in slow.items()]
    for kind, tokens in (("prefill", PREFILL), ("decode", 1)):
        measured = found[kind, NAMES[2]]
        predicted = counts_of(settings, RANKS, tokens, logits=tokens)
        assert predicted.all_reduces == measured["all_reduces"], (predicted, measured)
        assert predicted.all_gathers == measured["all_gathers"], (predicted, measured)
        assert math.isclose(predicted.sent, measured["sent"]), (predicted, measured)
    return missed


def main() -> None:
    """Run all of it, print it, and write results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        checkpoint(path, options.layers)
        points = in_processes(path, options.repeats)
    missed = check(points, config(options.layers))
    steps = [point for point in points if point["case"] in STEPS]
    print(
        table(
            ("held by a rank", "MB", "of all", "of what can be split", "peak of loading"),
            [
                (
                    p["model"],
                    f"{p['bytes'] / 1e6:,.0f}",
                    f"{p['share']:.3f}",
                    f"{p['share_of_splittable']:.3f}",
                    f"{p['load_peak'] / 1e6:,.0f} MB",
                )
                for p in points
                if p["case"] == "bytes"
            ],
        )
    )
    print()
    print(
        table(
            ("step", "model", "collectives", "sent", "seconds", "ratio", "communication"),
            [
                (
                    p["case"],
                    p["model"],
                    f"{p['all_reduces']} + {p['all_gathers']} + {p['all_to_alls']}",
                    f"{p['sent'] / 1e3:,.0f} kB",
                    f"{p['seconds']:.4f}",
                    f"{p['ratio_to_transformers']:.2f}",
                    f"{p['share_of_communication']:.0%}" if "share_of_communication" in p else "",
                )
                for p in steps
            ],
        )
    )
    more = [*imbalance(), *memory_table(), *modelled()]
    print()
    print(
        table(
            ("ranks", "placement", "fullest rank / mean", "no placement is below"),
            [
                (str(p["degree"]), p["placement"], f"{p['fullest']:.2f}", f"{p['bound']:.2f}")
                for p in more
                if p["case"] == "imbalance"
            ],
        )
    )
    print()
    print(table(("parameters", "1", "2", "4", "8 ranks, GB on the fullest"), memory_rows(more)))
    print()
    print(
        table(("decoding", "GPU", "batch", "1", "2", "4", "8 GPUs, ms (weights + communication)"), modelled_rows(more))
    )
    path = record("parallel", points + more, "python -m benchmarks.parallel")
    print(f"\nwritten to {path}")
    for line in missed:
        print(f"NOT REACHED: {line}")


def memory_rows(points: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table of memory, one row for each size, packed and dense."""
    rows: dict[str, list[str]] = {}
    for p in points:
        if p["case"] == "memory":
            label = f"{p['size']}, {'packed' if p['packed'] else 'bfloat16'}"
            rows.setdefault(label, []).append(f"{p['bytes'] / 1e9:.1f}")
    return [(label, *cells) for label, cells in rows.items()]


def modelled_rows(points: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The modelled points, one row for each size, GPU and batch."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for p in points:
        if p["case"] == "modelled":
            cell = "does not fit" if not p["fits"] else f"{1e3 * p['weights']:.2f} + {1e3 * p['communication']:.2f}"
            rows.setdefault((p["size"], p["gpu"], str(p["batch"])), []).append(cell)
    return [(*key, *cells) for key, cells in rows.items()]


def in_processes(path: Path, repeats: int) -> list[dict[str, Any]]:
    """The points of the first of the ranks."""
    store = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    multiprocessing.spawn(on_rank, (store.port, path, repeats), nprocs=RANKS)
    points: list[dict[str, Any]] = json.loads((path / POINTS).read_text())
    return points


if __name__ == "__main__":
    main()
