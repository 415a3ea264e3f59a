"""Attention on pages equals attention on what lies in them, for every instruction set this CPU has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gptoss_opt.kernels import native
from gptoss_opt.kernels.attention import Rules, Visible
from gptoss_opt.kernels.attention.impl.reference import reference_attention
from gptoss_opt.kernels.paged_attention import Chunk, Paged, blocks_for, paged_attention
from gptoss_opt.kernels.paged_attention.impl import native as paged_native
from gptoss_opt.kernels.paged_attention.impl.torch import decode

SETS = range(4) if native.why_not("cpu", torch.float32) else range(native.library().best + 1)
native_only = pytest.mark.skipif(
    native.why_not("cpu", torch.float32) is not None, reason="the native library is not built here"
)


class Problem(NamedTuple):
    """Decoding sequences of several lengths, in pages whose other places are not numbers. q [R, H, D], sinks [H]."""

    q: Tensor
    sinks: Tensor
    paged: Paged
    lengths: list[int]
    firsts: list[int]

    def of_row(self, row: int, x: Tensor) -> Tensor:
        """The keys or values [N, S, D] of a sequence, from its first."""
        pages = x[self.paged.block_table[row].long()].transpose(0, 1).flatten(1, 2)
        return pages[:, self.firsts[row] : self.lengths[row]]

    def expected(self, scale: float, window: int | None) -> Tensor:
        """By plain attention in float64, sequence by sequence."""
        rows = []
        for row in range(len(self.lengths)):
            k, v = (self.of_row(row, x[0])[None].double() for x in (self.paged.keys, self.paged.values))
            q = self.q[row][None, :, None].double()
            rows.append(reference_attention(q, k, v, self.sinks.double(), Rules(scale, window, Visible()))[0, :, 0])
        return torch.stack(rows)


def problem(
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (8, 2),
    dim: int = 32,
    page_size: int = 4,
    lengths: tuple[int, ...] = (1, 4, 9, 70, 131),
    firsts: tuple[int, ...] = (0, 0, 3, 0, 4),
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    width = -(-max(lengths) // page_size)
    tables = torch.randperm(len(lengths) * width, generator=generator).view(len(lengths), width).int() + 1
    keys, values = (
        torch.full((tables.numel() + 1, num_kv_heads, page_size, dim), torch.nan, dtype=dtype) for _ in range(2)
    )
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        for token in range(first, length):
            page, place = int(tables[row, token // page_size]), token % page_size
            for x in (keys, values):
                x[page, :, place] = torch.randn(num_kv_heads, dim, generator=generator).to(dtype)
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    nowhere = torch.zeros(0, dtype=torch.int64)
    paged = Paged(
        {0: keys},
        {0: values},
        nowhere,
        nowhere,
        tables,
        torch.tensor(firsts, dtype=torch.int32),
        context_lens,
        (),
        "torch",
        blocks_for("native", context_lens, (), num_heads // num_kv_heads),
    )
    q = torch.randn(len(lengths), num_heads, dim, generator=generator).to(dtype)
    return Problem(q, torch.randn(num_heads, generator=generator), paged, [*lengths], [*firsts])


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decode_in_plain_operations(dtype: torch.dtype, window: int | None) -> None:
    one = problem(dtype)
    keys, values = one.paged.keys[0], one.paged.values[0]
    found = decode(one.q, keys, values, one.sinks, one.paged, 0.2, window)
    assert torch.allclose(found.double(), one.expected(0.2, window), atol=TOLERANCE[dtype], rtol=0)
    assert not torch.allclose(found.double(), one.expected(0.2, 5), atol=1e-3)


@native_only
@pytest.mark.parametrize("instruction_set", SETS, ids=lambda number: native.INSTRUCTION_SETS[number])
@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize(
    ("heads", "dim", "page_size"), [((8, 2), 32, 4), ((3, 3), 16, 16), ((12, 2), 48, 1), ((16, 2), 64, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_by_the_native_library(
    dtype: torch.dtype, heads: tuple[int, int], dim: int, page_size: int, window: int | None, instruction_set: int
) -> None:
    one = problem(dtype, heads, dim, page_size)
    keys, values = one.paged.keys[0], one.paged.values[0]
    found = paged_native.attend(one.q, keys, values, one.sinks, one.paged, 0.2, window, instruction_set=instruction_set)
    truth = one.expected(0.2, window)
    if dtype == torch.bfloat16:
        # Only the result is rounded.
        assert torch.allclose(found.double(), truth, atol=1e-6, rtol=2**-8)
    else:
        assert torch.allclose(found.double(), truth, atol=TOLERANCE[dtype], rtol=0)
    without = paged_native.attend(one.q, keys, values, one.sinks - 9, one.paged, 0.2, window)
    assert not torch.allclose(without.double(), truth, atol=1e-2)


@native_only
@pytest.mark.parametrize("large", [60.0, -60.0])
def test_large_logits_neither_overflow_nor_vanish(large: float) -> None:
    one = problem()
    q = one.q * large
    found = paged_native.attend(q, one.paged.keys[0], one.paged.values[0], one.sinks, one.paged, 1.0, None)
    assert torch.allclose(found.double(), one._replace(q=q).expected(1.0, None), atol=1e-5)


@native_only
def test_the_native_library_says_what_it_does_not_take() -> None:
    assert "multiple of 16, not 24" in str(native.why_no_attention("cpu", torch.float32, 24))
    assert "float64" in str(native.why_no_attention("cpu", torch.float64, 32))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("backend", "chunks"),
    [("torch", "torch"), ("torch", "reference"), pytest.param("native", "torch", marks=native_only)],
)
def test_packed_queries_see_their_own_sequence(window: int | None, backend: str, chunks: str) -> None:
    """Two that decode, a prompt from its beginning, and two chunks that go on: end to end in one row."""
    dtype = torch.float32 if backend == "native" else torch.float64
    # 300 keys are several times what is looked at at a time; 13 queries are more than one unit of work.
    base = problem(dtype, lengths=(9, 20, 7, 30, 300), firsts=(0, 0, 0, 0, 2))
    new = {0: 1, 1: 1, 2: 7, 3: 11, 4: 13}
    heads, dim, size = 8, 32, 4
    keys, values = base.paged.keys[0], base.paged.values[0]
    whole = {row: [base.of_row(row, x).clone() for x in (keys, values)] for row in new}
    new_ones = {row: base.lengths[row] - base.firsts[row] - count for row, count in new.items()}
    rows = [row for row, count in new.items() for _ in range(count)]
    tokens = [t for row, count in new.items() for t in range(base.lengths[row] - count, base.lengths[row])]
    k, v = (torch.cat([whole[row][n][:, new_ones[row] :] for row in new], 1).transpose(0, 1) for n in range(2))
    q = torch.randn(len(rows), heads, dim, dtype=dtype)
    table = base.paged.block_table.long()
    pages, places = table[rows, torch.tensor(tokens) // size], torch.tensor(tokens) % size
    for x in (keys, values):
        x[pages, :, places] = torch.nan  # they are stored by the call
    prompts = (Chunk(2, 9, 7, 0), Chunk(9, 20, 30, 0), Chunk(20, 33, 300, 2))
    paged = base.paged._replace(
        pages=pages,
        places=places,
        chunks=prompts,
        backend=backend,
        blocks=blocks_for(backend, base.paged.context_lens, prompts, 4),
    )
    as_row = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = paged_attention(*as_row, base.sinks, paged=paged, layer=0, scale=0.2, window=window, backend=chunks)
    assert found.shape == (1, len(rows), heads, dim)
    begin = 0
    for row, count in new.items():
        mine = q[begin : begin + count].transpose(0, 1)[None].double()
        seen = (x[None].double() for x in whole[row])
        truth = reference_attention(mine, *seen, base.sinks.double(), Rules(0.2, window, Visible()))
        assert torch.allclose(found[0, begin : begin + count].double(), truth[0].transpose(0, 1), atol=TOLERANCE[dtype])
        begin += count
