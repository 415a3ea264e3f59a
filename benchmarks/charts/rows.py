"""Which charts there are, and the numbers of each, taken from the lines of one file of results/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Lines = Sequence[Mapping[str, Any]]
Rows = Mapping[str, Mapping[str, float]]
"""By label, then by series."""
SHOWN = ("q_proj", "o_proj", "router", "lm_head")
"""The linear layers that are shown."""


@dataclass(frozen=True)
class Chart:
    """One chart, drawn once for each hardware that a benchmark has results of.

    Attributes:
        name: of the picture.
        benchmark: the beginning of the names of the files in results/.
        title, axis: what stands above the chart, and below its axis.
        rows: its numbers, from the lines of a file.
        about: what it shows, in sentences for the page.
        is_ratio: whether one is "as fast as the other", and is marked.
        is_curve: drawn as points on a line, with labels that are numbers.
    """

    name: str
    benchmark: str
    title: str
    axis: str
    rows: Callable[[Lines], Rows]
    about: str
    is_ratio: bool = False
    is_curve: bool = False


def _attention(lines: Lines) -> Rows:
    passes = {"forward": "forward", "both": "forward and backward"}
    return {
        line["case"]: {words: line[key]["ratio"]["eager"] for key, words in passes.items() if key in line}
        for line in lines
        if "forward" in line
    }


def _experts(lines: Lines) -> Rows:
    return {line["case"]: line["ratio"] for line in lines if "best of transformers" in line}


def _linears(lines: Lines) -> Rows:
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        if line.get("dtype") == "torch.bfloat16" and line["projection"] in SHOWN and line["rows"] in (1, 4, 16, 64):
            found.setdefault(f"{line['rows']} rows", {})[line["projection"]] = line["ratio"]
    return found


def _whole(lines: Lines) -> Rows:
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        if "peer" in line:
            found.setdefault(line["peer"], {})[f"{line['what']}"] = line["ratio"]
    return found


def _batching(lines: Lines) -> Rows:
    rates = next(line["tokens/s"] for line in lines if line["case"].startswith("mixed workload"))
    return {name: {"tokens/s": rate} for name, rate in rates.items()}


def _concurrency(lines: Lines) -> Rows:
    rates = next(line["tokens/s"] for line in lines if line["case"] == "tokens/s by max_num_sequences")
    return {number: {"tokens/s": rate} for number, rate in rates.items()}


def _finetune(key: str, unit: float) -> Callable[[Lines], Rows]:
    def rows(lines: Lines) -> Rows:
        beside = next(line for line in lines if "speed ratio" in line)
        return {name: {"": value / unit} for name, value in beside[key].items()}

    return rows


def _loss(lines: Lines) -> Rows:
    return {line["case"]: {name: peak / 1e9 for name, peak in line["peak"].items()} for line in lines}


CHARTS = (
    Chart(
        "attention",
        "attention",
        "Attention: how many times as fast as eager",
        "times the speed of transformers' eager attention",
        _attention,
        "Attention of one layer in the head geometry of gpt-oss-20b, by [`with_flash_attention`](flash_attention.md). "
        "The number in a name is the length; decode is one query against so many keys.",
        is_ratio=True,
    ),
    Chart(
        "experts",
        "experts",
        "Experts: how many times as fast as transformers' best",
        "times the speed of the fastest of transformers' implementations",
        _experts,
        "One layer of the 20b's experts, packed by [`with_mxfp4_experts`](mxfp4.md) and dense by "
        "[`with_fast_experts`](fast_experts.md), in bfloat16. transformers' weights are dense.",
        is_ratio=True,
    ),
    Chart(
        "linears",
        "tune",
        "Linear layers: how many times as fast as torch",
        "times the speed of torch's product",
        _linears,
        "The native product by itself in bfloat16. [`with_fast_linears`](fast_linears.md) uses it only where it is "
        "faster.",
        is_ratio=True,
    ),
    Chart(
        "whole",
        "whole",
        "A whole model for one user: how many times as fast",
        "times the speed of each peer, in turns with it",
        _whole,
        "Four layers of the 20b's shapes with its head, in bfloat16. Prefill is a prompt of 512 tokens. llama.cpp has "
        "the same packed bits; vLLM (its build for CPUs) and transformers have dequantised weights.",
        is_ratio=True,
    ),
    Chart(
        "serving",
        "batching",
        "Serving 32 requests of various lengths",
        "generated tokens per second",
        _batching,
        "[`ContinuousBatcher`](continuous_batching.md) on a model of 8 layers and 491 M parameters, beside vLLM's "
        "build for CPUs and transformers.",
    ),
    Chart(
        "concurrency",
        "batching",
        "Serving: tokens per second by sequences at once",
        "sequences at once (max_num_sequences)",
        _concurrency,
        "The same model, packed, with more and more sequences in a step.",
        is_curve=True,
    ),
    Chart(
        "finetune",
        "finetune",
        "LoRA: tokens per second",
        "trained tokens per second, sequences of 1,024 tokens",
        _finetune("tokens/s", 1.0),
        "A step of [`with_lora`](lora.md) on packed experts, with flash attention and the chunked loss, on 8 layers "
        "and 491 M parameters. The peer is PEFT on dense weights, in two of transformers' computations of the experts.",
    ),
    Chart(
        "finetune-memory",
        "finetune",
        "LoRA: memory above the weights",
        "GB at the peak of a step, sequences of 1,024 tokens",
        _finetune("peak bytes above the weights", 1e9),
        "The memory of the same steps, without what the weights take.",
    ),
    Chart(
        "loss",
        "loss",
        "The loss: memory above its input",
        "GB at the peak, forward and backward",
        _loss,
        "Head and loss over the 201,088 words of gpt-oss in bfloat16 (32,000 where it says so), by "
        "[`with_chunked_loss`](chunked_loss.md). torch is its `linear_cross_entropy`.",
    ),
)
