"""Steps in which all sequences decode, captured once in CUDA graphs and replayed: Python then takes no time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import Inputs, Seen
from .pages import NOWHERE

Run = Callable[[], Tensor]


class CudaCapture:
    """Captures what a function does on the GPU; all captures share their memory, as only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Run once to warm up, and capture; what is returned does the same again, into the same tensor."""
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
    """One graph for each number of sequences and width of the tables, both rounded up to a power of two.

    Args:
        forward: what is captured.
        most_rows: how many sequences there are at most.
        capture: how; see `CudaCapture`.
    """

    def __init__(self, forward: Callable[[Inputs], Tensor], most_rows: int, capture: Callable[[Run], Run]) -> None:
        self._forward, self._most_rows, self._capture = forward, most_rows, capture
        self._made: dict[tuple[int, int], tuple[Inputs, Run]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def run(self, inputs: Inputs) -> Tensor:
        """The logits [S, V] of inputs without chunks."""
        num_rows, width = inputs.seen[0].tables.shape
        key = min(_rounded_up(num_rows), self._most_rows), _rounded_up(width)
        fresh = key not in self._made
        buffers = _padding(inputs, *key) if fresh else self._made[key][0]
        _fill(buffers, inputs)
        if fresh:
            self._made[key] = buffers, self._capture(lambda: self._forward(buffers))
        return self._made[key][1]()[inputs.last]


def _rounded_up(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padding(like: Inputs, num_rows: int, width: int) -> Inputs:
    """Inputs in which every row is padding: a sequence of one token, kept nowhere."""

    def filled(x: Tensor, value: int) -> Tensor:
        return x.new_full((num_rows, *x.shape[1:]), value)

    seen = [
        Seen(
            filled(one.pages, NOWHERE),
            filled(one.places, 0),
            one.tables.new_full((num_rows, width), NOWHERE),
            filled(one.firsts, 0),
            filled(one.lengths, 1),
            (),
        )
        for one in like.seen
    ]
    everything = torch.arange(num_rows, device=like.last.device)
    return Inputs(filled(like.tokens, 0), filled(like.positions, 0), everything, tuple(seen))


def _fill(buffers: Inputs, inputs: Inputs) -> None:
    """Put inputs into the first rows of buffers, and padding into the others."""
    num_rows, width = inputs.seen[0].tables.shape
    pairs = [(buffers.tokens, inputs.tokens, 0), (buffers.positions, inputs.positions, 0)]
    for to, one in zip(buffers.seen, inputs.seen, strict=True):
        pairs += [(to.pages, one.pages, NOWHERE), (to.places, one.places, 0)]
        pairs += [(to.firsts, one.firsts, 0), (to.lengths, one.lengths, 1)]
        # What is right of it, or below, is not looked at.
        to.tables[:num_rows, :width].copy_(one.tables)
    for to_rows, rows, padding in pairs:
        to_rows[:num_rows].copy_(rows)
        to_rows[num_rows:].fill_(padding)
