"""What runs a step: one packed forward of the model, captured in a CUDA graph where that can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..model.serving import keeping_hidden, logits_of, packed_forward, reads_pages
from .batch import Batch
from .graphs import DecodeGraphs, Run
from .inputs import Inputs, PagedMemory
from .sampler import Logprobs, logprobs_of

MAX_SCORES = 64
"""Of how many tokens of prompts the logits are computed at once: those of a whole prompt would take gigabytes."""


class Runner:
    """Runs batches on a model.

    Args:
        model: with attention that reads pages.
        memory: the pages.
        capture: how steps in which all sequences decode are captured, if they are: see `DecodeGraphs`.
    """

    def __init__(self, model: nn.Module, memory: PagedMemory, capture: Callable[[Run], Run] | None = None) -> None:
        self.model, self.memory = model, memory
        self.graphs = None if capture is None else DecodeGraphs(self.forward, memory.num_rows, capture)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, batch: Batch) -> tuple[Tensor, list[Logprobs]]:
        """The logits [S, V] after the tokens `batch.last`, and the log-probabilities of `batch.scores`."""
        if not reads_pages(self.model):
            raise ValueError("attention reads no pages: with_flash_attention was taken off a model that is served.")
        inputs = self.memory.inputs(batch)
        if batch.scores:
            with keeping_hidden(self.model) as hidden:
                logits = self.forward(inputs)
            return logits, self._scored(hidden[0], batch)
        if self.graphs is not None and len(batch.tokens) == len(batch.spans):
            return self.graphs.run(inputs), []
        return self.forward(inputs), []

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits [S, V]."""
        return packed_forward(self.model, *inputs)

    def _scored(self, hidden: Tensor, batch: Batch) -> list[Logprobs]:
        found: list[Logprobs] = []
        for begin in range(0, len(batch.scores), MAX_SCORES):
            places, tokens, counts = zip(*batch.scores[begin : begin + MAX_SCORES], strict=True)
            logits = logits_of(self.model, hidden[torch.tensor(places, device=hidden.device)])
            found += logprobs_of(logits, tokens, counts)
        return found

    def free(self) -> None:
        """Give the memory of the pages back, whoever still holds the runner. Nothing can be computed after."""
        self.memory.keys.clear()
        self.memory.values.clear()
        self.graphs = None
