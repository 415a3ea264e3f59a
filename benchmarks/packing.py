"""Packing a dense model: one layer of the 20b, quantised, measured and written by `with_mxfp4_experts(model)`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import seconds
from gptoss_opt import with_mxfp4_experts
from gptoss_opt.kernels.mxfp4 import format as plain
from gptoss_opt.model.experts import PROJECTIONS

CONFIG = GptOssConfig(num_hidden_layers=1, num_local_experts=32, vocab_size=1000)
RATE_ASKED = 1e9
"""Bytes of bfloat16 weights a second."""


def dense() -> Any:
    """A random model of one layer, in bfloat16."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(CONFIG).bfloat16()
    torch.nn.init.normal_(model.model.layers[0].mlp.experts.gate_up_proj, std=0.02)
    torch.nn.init.normal_(model.model.layers[0].mlp.experts.down_proj, std=0.02)
    return model


@dataclass(frozen=True)
class Packing(Case):
    """The wrapper on a fresh model each time."""

    columns = """
        case   | time           | weights in        | asked
        {case} | {seconds:.2f} s | {rate!G:.2f} GB/s | >= {asked!G:g} GB/s
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        taken, num_bytes = [], 0
        for _ in range(repeats):
            model = dense()
            num_bytes = sum(getattr(model.model.layers[0].mlp.experts, name).nbytes for name in PROJECTIONS)
            taken.append(seconds(partial(with_mxfp4_experts, model)))
        median = statistics.median(taken)
        return [{"seconds": round(median, 3), "bytes/s": round(num_bytes / median), "asked bytes/s": RATE_ASKED}]

    def verify(self, made: None, points: list[Point]) -> None:
        """The bits are those of plain torch, for the first and the last expert."""
        model = dense()
        experts = model.model.layers[0].mlp.experts
        weights = {name: getattr(experts, name)[[0, -1]].clone() for name in PROJECTIONS}
        with_mxfp4_experts(model)
        for name, weight in weights.items():
            blocks, scales = plain.pack(weight.mT)
            assert torch.equal(getattr(experts, f"{name}_blocks")[[0, -1]], blocks), name
            assert torch.equal(getattr(experts, f"{name}_scales")[[0, -1]], scales), name

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        return [{"seconds": p["seconds"], "rate": p["bytes/s"], "asked": p["asked bytes/s"]} for p in points]

    def missed(self, points: list[Point]) -> list[str]:
        return [f"{p['bytes/s'] / 1e9:.2f} GB/s, not 1" for p in points if p["bytes/s"] < RATE_ASKED]


def cases(settings: Settings, folder: Path) -> list[Case]:
    """One layer."""
    return [Packing("packing a 20b layer")]


SETTINGS = Settings()
