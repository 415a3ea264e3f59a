"""What the fullest device holds at its peak, by what it is for: in closed form.

Weights, keys and values, gradients and the state of the optimizer are counted; activations are what the layers of this
package keep and compute with, per token:

    kept for the backward pass = queries and output, keys and values, log-sum-exp, two norms in float32, the input of
        attention, and of the experts: their rows, gate and up, the activation, and their results
    at work                    = rows of the experts and their results, gate and up, the activation; in a backward pass
        about twice that, as gradients of each stand beside it

How near that is to what processes really hold is measured by `python -m benchmarks plan`.

Legend: H the hidden size, I the experts' inner size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import Stack
from ..kernels.loss import rows_of_chunk
from ..model.training_memory import OPTIMIZERS
from .cache import cache_bytes
from .hardware import Device
from .parameters import Parameters
from .workload import Workload

PROCESS = {"cpu": 60_000_000, "cuda": 600_000_000}
"""What a process takes for itself: threads' buffers; on a GPU what CUDA and its libraries keep (measured: 0.5 GB)."""
MEETING = {"cpu": 80_000_000, "cuda": 300_000_000}
"""What a rank takes beside that to meet others: Gloo's threads and NCCL's channels keep buffers of their own."""
TRAINING = 100_000_000
"""What training takes beside what is counted: copies of factors, the optimizer's temporaries."""
FRAGMENTS = 0.03
"""The part of what comes and goes on a GPU that its allocator cannot use."""
WHOLE_LOGITS = 13
"""Bytes of a logit where all are there for the loss: in bfloat16, and in float32 with softmax and gradient."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device at its peak, above what a process held before.

    Attributes:
        weights: by kind: experts, attention, embedding and head, router and norms, adapters.
        cache: keys and values, by type of layer.
        activations: what layers keep and compute with.
        logits: those that are there at once.
        gradients, optimizer: of what is trained.
        buffers: what collectives send and receive.
        overhead: of the process, and of the allocator.
    """

    weights: Mapping[str, int]
    cache: Mapping[str, int]
    activations: int
    logits: int
    gradients: int
    optimizer: int
    buffers: int
    overhead: int

    @property
    def lines(self) -> dict[str, int]:
        """All of it by a label, in bytes, without what there is none of."""
        found = {f"weights: {kind}": count for kind, count in self.weights.items()}
        found |= {f"keys and values: {kind.replace('_', ' ')}": count for kind, count in self.cache.items()}
        for name in ("activations", "logits", "gradients", "optimizer"):
            found[name] = getattr(self, name)
        found |= {"collectives' buffers": self.buffers, "process and allocator": self.overhead}
        return {label: count for label, count in found.items() if count}

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(self.lines.values())


def memory_of(config: Any, held: Parameters, stack: Stack, work: Workload, device: Device) -> Memory:
    """What the fullest rank holds at its peak while it does some work.

    Args:
        config: of the model.
        held: its parameters, and which part of heads, experts and words it has.
        stack: the wrappers.
        work: what is done.
        device: what it is done on.

    Example:
        >>> from gptoss_opt import compose
        >>> from gptoss_opt.planner import described
        >>> from gptoss_opt.planner.parameters import parameters_of
        >>> device, stack = described("cpu:24GB").device, compose()
        >>> memory_of(model.config, parameters_of(model, stack), stack, Workload(), device).gradients
        0
    """
    names, size = {wrapper.name for wrapper in stack}, held.itemsize
    trained = held.trainable if work.task == "lora" else held.dense if work.task == "full" else {}
    gradients = sum(count * each for each, count in trained.items())
    state = OPTIMIZERS[work.optimizer]
    values = 1 if state.factored else state.values  # what rows and columns take is next to nothing
    optimizer = 0 if state.factored else sum(n * values * (state.value_bytes or each) for each, n in trained.items())
    cache = (
        {}
        if work.trains
        else cache_bytes(config, context=work.context, batch=work.batch, itemsize=size, share=held.heads)
    )
    activations = round(work.tokens * _per_token(config, held, work))
    words = round(config.vocab_size * held.words)
    if not work.trains:
        logits = work.batch * words * (size + 4)
    elif "with_chunked_loss" in names:
        num_trained = words * config.hidden_size if work.task == "full" else 0
        logits = min(work.tokens, rows_of_chunk(words, num_trained, size)) * words * size
        # With the sum of the head's gradient, in float32, and what it becomes: before there are other gradients.
        logits = max(0, logits + num_trained * 6 - gradients)
    else:
        logits = work.tokens * words * WHOLE_LOGITS
    buffers = 2 * work.tokens * config.hidden_size * size if held.ranks > 1 else 0
    moving = activations + logits + buffers + gradients + sum(cache.values())
    overhead = PROCESS[device.kind] + MEETING[device.kind] * (held.ranks > 1) + TRAINING * work.trains
    overhead += round(FRAGMENTS * moving) if device.kind == "cuda" else 0
    return Memory(held.weights, cache, activations, logits, gradients, round(optimizer), buffers, overhead)


def _per_token(config: Any, held: Parameters, work: Workload) -> float:
    """Bytes of activations for each token of a forward."""
    size, hidden, top_k = held.itemsize, config.hidden_size, config.num_experts_per_tok
    heads = config.num_attention_heads * held.heads
    queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim * held.heads
    inner = config.intermediate_size * held.inner
    rows = top_k * size * (2 * hidden + 3 * inner)
    if not work.trains:
        return float(rows + 4 * size * hidden)
    norms, inputs = (4, 2) if work.task == "full" else (2, 1)
    attention = size * (2 * queries + 2 * keys + inputs * hidden) + 4 * heads
    kept = attention + 4 * norms * hidden + rows
    at_work, layers = 2 * rows, config.num_hidden_layers
    return float(at_work + (layers * size * hidden + kept if work.checkpointing else layers * kept))
