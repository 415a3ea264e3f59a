"""Sharded models: bytes per rank, collectives per token, time beside transformers' expert parallelism.

Two processes with one thread each, on Gloo. What scales is counted; times are of this machine only. On a machine with
several GPUs the same ranks use NCCL; Gloo on CUDA tensors would be a smoke test, and is not timed.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from benchmarks import case
from benchmarks.case import Case, Point
from benchmarks.ranks import PREFILL, RANKS, STACKS, STEPS, TRANSFORMERS, points_of_ranks
from benchmarks.step_model import GPUS, RELEASED, Step, bytes_held, counts_of, step_time
from gptoss_opt import balance_experts
from gptoss_opt.distributed import split

EXPERTS, BOTH = STACKS
MAX_SHARE = 0.51
MAX_TIME_RATIO = 1.0
SLACK = 64 << 20
"""What a process takes besides the shard and one tensor when it loads a shard, in bytes."""
DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Settings(case.Settings):
    """What else can be set: the layers of the model."""

    layers: int = 2


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


@functools.cache
def checkpoint(folder: Path, layers: int) -> Path:
    """A random dense checkpoint in bfloat16."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = GptOssForCausalLM(config(layers))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.02) if "norm" not in name else nn.init.ones_(parameter)
    model.save_pretrained(folder)
    return folder


# The ranks do all of it in one go: each case picks its own points.
on_ranks = functools.cache(points_of_ranks)


@dataclass(frozen=True)
class OnRanks(Case):
    """What the ranks find, beside transformers, on one checkpoint."""

    folder: Path
    layers: int

    def setup(self) -> Path:
        return checkpoint(self.folder, self.layers)

    def run(self, made: Path, repeats: int) -> list[Point]:
        return [point for point in on_ranks(made, repeats) if point["case"] == self.name]


@dataclass(frozen=True)
class Bytes(OnRanks):
    """What a rank holds, and the peak of loading it."""

    columns = """
        held by a rank | MB             | of all      | of what can be split      | peak of loading
        {model}        | {bytes!M:,.0f} | {share:.3f} | {share_of_splittable:.3f} | {load_peak!M:,.0f} MB
    """

    def verify(self, made: Path, points: list[Point]) -> None:
        """A rank cannot hold less than its share."""
        assert all(point["share"] >= 1 / RANKS for point in points), points

    def missed(self, points: list[Point]) -> list[str]:
        """Loading takes one tensor more than the shard; what can be split is split evenly."""
        shape, lines = config(self.layers), []
        largest = shape.num_local_experts * shape.hidden_size * 2 * shape.intermediate_size * 2 // RANKS
        for point in points:
            name, size, peak, share = (point[key] for key in ("model", "bytes", "load_peak", "share_of_splittable"))
            if name in STACKS and peak > size + largest + SLACK:
                lines.append(f"loading {name} took {peak / 1e6:.0f} MB, to hold {size / 1e6:.0f}")
            if name == BOTH and share > MAX_SHARE:
                lines.append(f"each rank holds {share:.3f} of what can be split, not {MAX_SHARE}")
        return lines


@dataclass(frozen=True)
class Steps(OnRanks):
    """Traffic and time of one kind of step, whose logits the ranks compare before they time it."""

    columns = """
        step   | model   | collectives | sent           | seconds       | ratio | communication
        {case} | {model} | {all_reduces} + {all_gathers} + {all_to_alls} | {sent!k:,.0f} kB | {seconds:.4f} \
            | {ratio_to_transformers:.2f} | {share_of_communication:.0%}
    """

    def verify(self, made: Path, points: list[Point]) -> None:
        """The model of the step's time counts what the ranks counted."""
        tokens = {"prefill": PREFILL, "decode": 1}.get(self.name)
        if tokens is not None:
            predicted = counts_of(config(self.layers), RANKS, tokens, logits=tokens)
            measured = next(point for point in points if point["model"] == BOTH)
            assert predicted.all_reduces == measured["all_reduces"], (predicted, measured)
            assert predicted.all_gathers == measured["all_gathers"], (predicted, measured)
            assert math.isclose(predicted.sent, measured["sent"]), (predicted, measured)

    def missed(self, points: list[Point]) -> list[str]:
        """Experts alone send no more than transformers does, and neither stack takes longer."""
        found = {point["model"]: point for point in points}
        theirs, ours = found[TRANSFORMERS]["sent"], found[EXPERTS]["sent"]
        ratios = {name: found[name]["ratio_to_transformers"] for name in STACKS}
        lines = [f"{self.name}: {EXPERTS} sends {ours:.0f} bytes, transformers {theirs:.0f}"] * (ours > theirs)
        slow = {name: ratio for name, ratio in ratios.items() if ratio > MAX_TIME_RATIO}
        return lines + [f"{self.name}: {name} takes {ratio:.2f}x the time" for name, ratio in slow.items()]


@dataclass(frozen=True)
class Imbalance(Case):
    """How full the fullest rank is, of the mean, under a load that falls off as one over the rank of the expert."""

    columns = """
        ranks    | placement   | fullest rank / mean | no placement is below
        {degree} | {placement} | {fullest:.2f}       | {bound:.2f}
    """

    def setup(self) -> list[list[float]]:
        random = torch.Generator().manual_seed(0)
        weights = 1 / torch.arange(1, 33, dtype=torch.float64)
        return [weights[torch.randperm(32, generator=random)].tolist() for _ in range(24)]

    def run(self, made: list[list[float]], repeats: int) -> list[Point]:
        points = []
        for degree in DEGREES[1:]:
            contiguous = [tuple(tuple(part) for part in split(32, degree))] * len(made)
            bound = max(1.0, max(made[0]) / (sum(made[0]) / degree))
            for name, placement in (("contiguous", contiguous), ("balanced", balance_experts(made, degree))):
                fullest = statistics.mean(map(fullest_of, made, placement))
                points.append({"degree": degree, "placement": name, "fullest": fullest, "bound": bound})
        return points

    def verify(self, made: list[list[float]], points: list[Point]) -> None:
        """No placement is below the bound."""
        assert all(point["fullest"] >= point["bound"] * (1 - 1e-9) for point in points), points


def fullest_of(load: Sequence[float], placement: Sequence[Sequence[int]]) -> float:
    """The load of the fullest rank, of the mean."""
    return max(sum(load[e] for e in experts) for experts in placement) / (sum(load) / len(placement))


@dataclass(frozen=True)
class Memory(Case):
    """The parameters of the released models on the fullest of 1 to 8 ranks, by the layout."""

    columns = """
        parameters        | 1             | 2             | 4             | 8 ranks, GB on the fullest
        {size}, {storage} | {on 1!G:.1f}  | {on 2!G:.1f}  | {on 4!G:.1f}  | {on 8!G:.1f}
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        return [
            {"size": size, "packed": packed, "degree": n, "bytes": bytes_held(RELEASED[size], n, packed=packed)}
            for size, packed, n in itertools.product(RELEASED, (True, False), DEGREES)
        ]

    def verify(self, made: None, points: list[Point]) -> None:
        """The ranks hold at least all of it together."""
        whole = {(point["size"], point["packed"]): point["bytes"] for point in points if point["degree"] == 1}
        for point in points:
            assert point["bytes"] * point["degree"] >= whole[point["size"], point["packed"]], point

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        rows: dict[Any, Point] = {}
        for point in points:
            row = rows.setdefault((point["size"], point["packed"]), {"size": point["size"]})
            row |= {"storage": "packed" if point["packed"] else "bfloat16", f"on {point['degree']}": point["bytes"]}
        return rows.values()


@dataclass(frozen=True)
class Modelled(Case):
    """Decoding on 1 to 8 GPUs by the model of the step's time."""

    columns = """
        decoding | GPU   | batch   | 1      | 2      | 4      | 8 GPUs, ms (weights + communication)
        {size}   | {gpu} | {batch} | {on 1} | {on 2} | {on 4} | {on 8}
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        return [
            {"size": size, "gpu": gpu.name, "degree": degree, "batch": batch}
            | step_time(RELEASED[size], gpu, Step(degree, batch, packed=True))
            for size, gpu, degree, batch in itertools.product(RELEASED, GPUS, DEGREES, (1, 64))
        ]

    def verify(self, made: None, points: list[Point]) -> None:
        """One GPU has nobody to talk to, and more GPUs never read more each."""
        alone = {(p["size"], p["gpu"], p["batch"]): p["weights"] for p in points if p["degree"] == 1}
        for point in points:
            assert (point["communication"] == 0) == (point["degree"] == 1), point
            assert point["weights"] <= alone[point["size"], point["gpu"], point["batch"]], point

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        rows: dict[Any, Point] = {}
        for point in points:
            row = rows.setdefault((point["size"], point["gpu"], point["batch"]), point.copy())
            times = f"{1e3 * point['weights']:.2f} + {1e3 * point['communication']:.2f}"
            row[f"on {point['degree']}"] = times if point["fits"] else "does not fit"
        return rows.values()


def cases(settings: Settings, folder: Path) -> list[Case]:
    """What two ranks measure here, and what the layout says of the released models."""
    steps = [Steps(kind, folder, settings.layers) for kind in STEPS]
    computed = [Imbalance("imbalance"), Memory("memory"), Modelled("modelled")]
    return [Bytes("bytes", folder, settings.layers), *steps, *computed]


SETTINGS = Settings(repeats=7)
