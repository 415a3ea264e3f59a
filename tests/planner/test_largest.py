"""The largest context that a plan names, at work in a process: it fits, and twice that does not.

Of generating alone: training of a model whose activations take hundreds of MB takes a minute. `python -m benchmarks
plan` does both, with layers of the released shapes.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM

from benchmarks.harness import forget_peak, resident
from benchmarks.plan import ABOVE, do
from gptoss_opt import Stack, load, plan
from gptoss_opt.planner.workload import Workload
from tests.helpers import tiny_config

MACHINE = "cpu:0.8GB"
WIDE = tiny_config(
    num_hidden_layers=2,
    hidden_size=1024,
    num_local_experts=8,
    num_experts_per_tok=8,
    vocab_size=1024,
    sliding_window=128,
    layer_types=["sliding_attention"] * 2,
)
"""Few weights, and all experts for every token: activations are nearly all that it takes, and quick to compute."""


def peaks(path: Path, stack: str, works: list[Workload], answer: Connection) -> None:
    """Send the most memory that this process has had, above what it had before it loaded a model, after each work."""
    torch.set_num_threads(1)
    before, found = forget_peak(), []
    model = load(path, Stack.from_json(stack))
    for work in works:
        do(model, work)
        found.append(resident("VmHWM") - before)
    answer.send(found)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a peak of memory so")
def test_the_largest_context_fits_and_twice_that_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GptOssForCausalLM(WIDE).to(torch.bfloat16).save_pretrained(tmp_path)
    largest = plan(tmp_path, hardware=MACHINE, context=WIDE.max_position_embeddings).max_context
    found = plan(tmp_path, hardware=MACHINE, context=largest)
    assert found.fits
    assert found.memory.activations > 0.8 * found.usable
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe(duplex=False)
    works = [Workload("generate", largest), Workload("generate", 2 * largest)]
    process = processes.Process(target=peaks, args=(tmp_path, found.stack.to_json(), works, theirs))
    process.start()
    theirs.close()
    once, twice = ours.recv()
    process.join()
    assert once <= (1 + ABOVE) * found.usable < twice
