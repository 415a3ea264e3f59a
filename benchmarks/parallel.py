"""Sharded models: bytes per rank, collectives per token, time beside transformers' expert parallelism, and a model of it.

    python -m benchmarks.parallel [--layers N] [--repeats N]

Two processes with one thread each, on Gloo. What scales is counted; times are of this machine only. On a machine with
several GPUs the same ranks use NCCL; Gloo on CUDA tensors would be a smoke test, and is not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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

from benchmarks.harness import record, table
from benchmarks.step_model import GPUS, RELEASED, Step, counts_of, step_time
from gptoss_opt import balance_experts, compose, load, shard_experts, shard_tensor_parallel, with_fast_experts
from gptoss_opt.distributed import collectives

RANKS = 2
PREFILL, TRAIN = 256, 128
SHARE = 0.51
TIME_RATIO = 1.0
TOLERANCE = 0.05
POINTS = "points.json"


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
    """What one rank sends in a step, besides itself: by ring algorithms, 2 (n - 1) / n of what it gives to an all-reduce,
    n - 1 times what it gives to an all-gather, and the parts for others of what it gives to an all-to-all."""

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
    models = {name: build(name, path) for name in NAMES}
    points: list[dict[str, Any]] = []
    for name, model in models.items():
        points.append({"case": "bytes", "model": name, **held(model)})
    for kind in STEPS:
        for name, model in models.items():
            model.train(kind == "train")
        points += steps_of_kind(models, kind, repeats)
    if rank == 0:
        (path / POINTS).write_text(json.dumps(points))
    distributed.barrier()
    distributed.destroy_process_group()


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
    for degree in (2, 4, 8):
        contiguous = [[list(range(r * 32 // degree, (r + 1) * 32 // degree)) for r in range(degree)]] * 24
        for name, placement in (("contiguous", contiguous), ("balanced", balance_experts(load, degree))):
            worst = [
                max(sum(layer[e] for e in experts) for experts in ranks) / (sum(layer) / degree)
                for layer, ranks in zip(load, placement, strict=True)
            ]
            bound = max(1.0, max(weights).item() / (sum(weights).item() / degree))
            points.append(
                {
                    "case": "imbalance",
                    "degree": degree,
                    "placement": name,
                    "fullest": statistics.mean(worst),
                    "bound": bound,
                }
            )
    return points


def modelled() -> list[dict[str, Any]]:
    """Decoding on 1 to 8 GPUs by the model of the step time."""
    points = []
    for size, settings in RELEASED.items():
        for gpu in GPUS:
            for degree in (1, 2, 4, 8):
                for batch in (1, 64):
                    found = step_time(settings, gpu, Step(degree, batch, packed=True))
                    points.append(
                        {"case": "modelled", "size": size, "gpu": gpu.name, "degree": degree, "batch": batch, **found}
                    )
    return points


def check(points: list[dict[str, Any]], settings: GptOssConfig) -> list[str]:
    """What of the targets is not reached, and where the model of the step counts otherwise than was measured."""
    found = {(point["case"], point["model"]): point for point in points if "model" in point}
    missed = []
    share = found["bytes", NAMES[2]]["share_of_splittable"]
    if share > SHARE:
        missed.append(f"each rank holds {share:.3f} of what can be split, not {SHARE}")
    for kind in STEPS:
        theirs = found[kind, NAMES[0]]
        for name in NAMES[1:2]:
            if found[kind, name]["sent"] > theirs["sent"]:
                missed.append(
                    f"{kind}: {name} sends {found[kind, name]['sent']:.0f} bytes, transformers {theirs['sent']:.0f}"
                )
        for name in NAMES[1:]:
            if found[kind, name]["ratio_to_transformers"] > TIME_RATIO:
                missed.append(f"{kind}: {name} takes {found[kind, name]['ratio_to_transformers']:.2f}x the time")
    for kind, tokens in (("prefill", PREFILL), ("decode", 1)):
        measured = found[kind, NAMES[2]]
        predicted = counts_of(settings, RANKS, tokens, logits=tokens)
        same = (predicted.all_reduces, predicted.all_gathers) == (measured["all_reduces"], measured["all_gathers"])
        assert same and math.isclose(predicted.sent, measured["sent"]), (predicted, measured)
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
            ("held by a rank", "MB", "of all", "of what can be split"),
            [
                (p["model"], f"{p['bytes'] / 1e6:,.0f}", f"{p['share']:.3f}", f"{p['share_of_splittable']:.3f}")
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
    more = [*imbalance(), *modelled()]
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
    print(
        table(("decoding", "GPU", "batch", "1", "2", "4", "8 GPUs, ms (weights + communication)"), modelled_rows(more))
    )
    path = record("parallel", points + more, "python -m benchmarks.parallel")
    print(f"\nwritten to {path}")
    for line in missed:
        print(f"NOT REACHED: {line}")


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
