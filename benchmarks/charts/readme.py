"""The table of the README: a few figures, by hardware, from results/."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import RESULTS

KINDS = {
    "zen-4": "AMD EPYC, Zen 4",
    "zen-5": "AMD EPYC, Zen 5",
    "xeon-with-amx": "Xeon with AMX",
    "nvidia-h100-80gb-hbm3": "H100",
}


def _gb(size: float) -> str:
    return f"{size / 1e9:.2g}"


FIGURES: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("attention, a prompt of 2,048 tokens", "attention", "full 2048 bfloat16", lambda it: shown(_eager(it, "forward"))),
    ("the same, forward and backward", "attention", "full 2048 bfloat16", lambda it: shown(_eager(it, "both"))),
    ("a sliding layer, 4,096 tokens", "attention", "sliding 4096 bfloat16", lambda it: shown(_eager(it, "forward"))),
    ("packed experts, 1 token", "experts", "1 tokens, forward", lambda it: shown(it["ratio"]["packed"])),
    ("packed experts, 512 tokens", "experts", "512 tokens, forward", lambda it: shown(it["ratio"]["packed"])),
    ("dense experts, 512 tokens", "experts", "512 tokens, forward", lambda it: shown(it["ratio"]["dense"])),
    (
        "q projection, 1 row, beside torch",
        "tune",
        "q_proj in bfloat16, 1 rows",
        lambda it: shown(it["ratio"]),
    ),
    (
        "serving 32 requests, beside `generate_batch`",
        "batching",
        "mixed workload of 32",
        lambda it: shown(it["ratio"]["transformers generate_batch"]),
    ),
    (
        "serving 32 requests, beside vLLM for CPUs",
        "batching",
        "mixed workload of 32",
        lambda it: shown(it["ratio"]["vLLM"]),
    ),
    (
        "LoRA, 1,024 tokens, beside PEFT",
        "finetune",
        "1,024 tokens, 8 layers",
        lambda it: f"{shown(it['speed ratio'])}, in {it['memory ratio']:.2g} times the memory",
    ),
    (
        "head and loss, 4,096 tokens",
        "loss",
        "4,096 tokens, hidden 640",
        lambda it: (
            f"{shown(it['ratio']['transformers'])}, in {_gb(it['peak']['ours'])} GB instead of "
            f"{_gb(it['peak']['transformers'])}"
        ),
    ),
)
"""What is shown: words, the benchmark, its case, and what is taken from the line of that case."""


def _eager(line: Mapping[str, Any], which: str) -> float:
    ratio: float = line[which]["ratio"]["eager"]
    return ratio


def shown(ratio: float) -> str:
    """A ratio in two digits, or as many as stand before the point."""
    return f"{ratio:.{0 if ratio >= 9.95 else 1 if ratio >= 1 else 2}f}"


def table() -> str:
    """The table in Markdown; a dash where nothing was measured."""
    lines = [f"| | {' | '.join(KINDS.values())} |", "|---|" + "---|" * len(KINDS)]
    for words, benchmark, case, taken in FIGURES:
        cells = []
        for kind in KINDS:
            path = RESULTS / f"{benchmark}-{kind}.jsonl"
            points = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            cells.append(next((taken(point) for point in points if point["case"] == case), "-"))
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
