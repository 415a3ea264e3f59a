"""What runs a step: the pages' memory, and one packed forward of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels import memory
from ..kernels.attention import Paged, choose_backend
from ..model.serving import KeyShape, check_reads_pages, packed_forward
from .batch import Batch
from .cache import Group
from .graphs import DecodeGraphs, Run
from .inputs import Inputs, Tables
from .pages import NOWHERE


class Runner:
    """Runs batches on a model.

    Args:
        model: with attention that reads pages.
        groups: the kinds of layers.
        shape: of the keys of one token in one layer.
        num_pages: how many pages there are, for all groups together.
        page_size: tokens of a page.
        max_num_sequences: rows of the tables.
        max_tokens: of a sequence.
        capture: how steps in which all decode are captured, if they are: see `DecodeGraphs`.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Group, ...],
        shape: KeyShape,
        *,
        num_pages: int,
        page_size: int,
        max_num_sequences: int,
        max_tokens: int,
        capture: Callable[[Run], Run] | None = None,
    ) -> None:
        self.model, self.groups = model, groups
        self.tables = Tables(groups, page_size, max_num_sequences, max_tokens, shape.device)
        # A page is of one group at a time, and holds the keys of all its layers: groups share the memory.
        size = (num_pages, shape.num_heads, page_size, shape.head_dim)
        made = [
            [memory.empty(size, shape.dtype, shape.device) for _ in range(2)]
            for _ in range(max(len(group.layers) for group in groups))
        ]
        self.keys = {layer: made[n][0] for group in groups for n, layer in enumerate(group.layers)}
        self.values = {layer: made[n][1] for group in groups for n, layer in enumerate(group.layers)}
        for tensor in (one for pair in made for one in pair):
            tensor[NOWHERE].zero_()  # rows of padding read it
        self.backend = choose_backend(shape.device.type, shape.dtype, shape.head_dim)
        self.graphs = None if capture is None else DecodeGraphs(self.forward, max_num_sequences, capture)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, batch: Batch) -> Tensor:
        """The logits [S, V] after the last token of each part."""
        check_reads_pages(self.model)
        inputs = self.tables.inputs(batch)
        if self.graphs is not None and not batch.chunks:
            return self.graphs.run(inputs)
        return self.forward(inputs)

    def free(self) -> None:
        """Give the memory of the pages back: whoever holds a request does not hold them."""
        self.keys.clear()
        self.values.clear()
        self.graphs = None

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits [S, V]."""
        paged = {
            group.kind: Paged(self.keys, self.values, *seen, self.backend)
            for group, seen in zip(self.groups, inputs.seen, strict=True)
        }
        return packed_forward(self.model, inputs.tokens, inputs.positions, paged, inputs.last)
