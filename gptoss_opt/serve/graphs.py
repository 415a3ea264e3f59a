"""Steps in which all sequences decode, captured once in CUDA graphs and replayed: Python then takes no time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import Inputs
from .pages import NOWHERE

Run = Callable[[], Tensor]


class CudaCapture:
    """Captures what a function does on the GPU; all captures share their memory, as only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Run once to warm up, and capture; what is returned does the same again, into the same tensor."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """One graph for each number of sequences and width of the block tables, both rounded up to a power of two.

    Args:
        forward: what is captured.
        max_rows: how many sequences there are at most.
        capture: how; see `CudaCapture`.
    """

    def __init__(self, forward: Callable[[Inputs], Tensor], max_rows: int, capture: Callable[[Run], Run]) -> None:
        self._forward, self._max_rows, self._capture = forward, max_rows, capture
        self._made: dict[tuple[int, int], tuple[Inputs, Run]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def run(self, inputs: Inputs) -> Tensor:
        """The logits [S, V] of inputs without chunks."""
        num_rows, width = next(iter(inputs.paged.values())).block_table.shape
        key = min(_rounded_up(num_rows), self._max_rows), _rounded_up(width)
        fresh = key not in self._made
        buffers = _padding(inputs, *key) if fresh else self._made[key][0]
        _fill(buffers, inputs)
        if fresh:
            self._made[key] = buffers, self._capture(lambda: self._forward(buffers))
        return self._made[key][1]()[inputs.last]


def _rounded_up(number: int) -> int:
    return 1 << (number - 1).bit_length()


ROWS = {"pages": NOWHERE, "places": 0, "context_starts": 0, "context_lens": 1}
"""The fields of `Paged` by row, with their values in a row of padding: a sequence of one token, kept nowhere."""


def _padding(like: Inputs, num_rows: int, width: int) -> Inputs:
    tokens = like.tokens.new_zeros(num_rows)
    paged = {}
    for kind, one in like.paged.items():
        assert one.blocks is None, "a backend that works out blocks on the host cannot be captured"
        rows = {name: getattr(one, name).new_full((num_rows,), value) for name, value in ROWS.items()}
        paged[kind] = one._replace(block_table=one.block_table.new_full((num_rows, width), NOWHERE), **rows)
    return Inputs(tokens, tokens.clone(), paged, torch.arange(num_rows, device=tokens.device))


def _fill(buffers: Inputs, inputs: Inputs) -> None:
    pairs = [(buffers.tokens, inputs.tokens, 0), (buffers.positions, inputs.positions, 0)]
    for kind, one in inputs.paged.items():
        to = buffers.paged[kind]
        pairs += [(getattr(to, name), getattr(one, name), value) for name, value in ROWS.items()]
        # What is right of it, or below, is not looked at.
        num_rows, width = one.block_table.shape
        to.block_table[:num_rows, :width].copy_(one.block_table)
    for to_rows, rows, padding in pairs:
        to_rows[: len(rows)].copy_(rows)
        to_rows[len(rows) :].fill_(padding)
