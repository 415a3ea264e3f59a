"""Collectives and their gradients, on 2 and 4 processes, against the same arithmetic in one."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import Tensor, distributed

from gptoss_opt.distributed import all_reduce_gradient, all_reduce_output, all_to_all, init_distributed, split
from tests.distributed.ranks import RankError, Ranks


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, first, second = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 8), (8, 9), (9, 8))
    )
    return x.requires_grad_(), first.requires_grad_(), second.requires_grad_()


def two_layers(leave_out: str = "") -> list[Tensor]:
    """A product split by columns, one split by rows: the output, the gradient of the input, and those of this rank."""
    x, first, second = given()
    mine = split(9, distributed.get_world_size())[distributed.get_rank()]
    columns, rows = first[:, mine.start : mine.stop], second[mine.start : mine.stop]
    group = distributed.group.WORLD
    assert group is not None
    inside = x if leave_out == "gradient" else all_reduce_gradient(x, group)
    y = (inside @ columns).tanh() @ rows
    y = y if leave_out == "output" else all_reduce_output(y, group)
    y.square().sum().backward()
    assert x.grad is not None
    assert first.grad is not None
    assert second.grad is not None
    return [y.detach(), x.grad, first.grad, second.grad]


def expected() -> list[Tensor]:
    x, first, second = given()
    y = (x @ first).tanh() @ second
    y.square().sum().backward()
    return [y.detach(), x.grad, first.grad, second.grad]


def test_two_layers_with_two_all_reduces(ranks: Ranks) -> None:
    exact, found = expected(), ranks(two_layers)
    for y, d_x, _, _ in found:
        torch.testing.assert_close([y, d_x], exact[:2])
    # Each rank has the gradients of what it holds: together they are all.
    torch.testing.assert_close([sum(parts) for parts in zip(*(one[2:] for one in found), strict=True)], exact[2:])


@pytest.mark.parametrize(("leave_out", "wrong"), [("output", 0), ("gradient", 1)])
def test_one_all_reduce_less_is_noticed(ranks: Ranks, leave_out: str, wrong: int) -> None:
    exact = expected()
    for one in ranks(two_layers, leave_out):
        assert not torch.allclose(one[wrong], exact[wrong], rtol=1e-2)


def exchanged(sizes: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Rank r sends sizes[r][s] rows to rank s, each row telling who sends it to whom and which it is."""
    rank, group = distributed.get_rank(), distributed.group.WORLD
    assert group is not None
    rows = [[rank, to, n] for to, count in enumerate(sizes[rank]) for n in range(count)]
    x = torch.tensor(rows, dtype=torch.float32).view(-1, 3).requires_grad_()
    y = all_to_all(x, sizes[rank], [row[rank] for row in sizes], group)
    # What each receiver makes of a row comes back to its sender.
    (y * (10.0 * rank + y.detach()[:, 2:])).sum().backward()
    return y.detach(), x.grad


def test_all_to_all_and_its_gradient(ranks: Ranks) -> None:
    num_ranks = ranks.num_ranks
    sizes = [[(3 * r + s) % 4 for s in range(num_ranks)] for r in range(num_ranks)]
    for rank, (y, gradient) in enumerate(ranks(exchanged, sizes)):
        assert y.tolist() == [[r, rank, n] for r in range(num_ranks) for n in range(sizes[r][rank])]
        sent = [[10.0 * to + n] * 3 for to in range(num_ranks) for n in range(sizes[rank][to])]
        assert gradient is not None
        assert gradient.tolist() == sent


def meshes() -> list[object]:
    flat = init_distributed(device="cpu")
    half = init_distributed((distributed.get_world_size() // 2, 2), ("dp", "tp"), device="cpu")
    return [flat.mesh_dim_names, flat.size(), half["tp"].size(), half["dp"].size(), half.device_type]


def test_init_distributed_arranges_the_ranks_that_are_there(ranks: Ranks) -> None:
    for found in ranks(meshes):
        assert found == [("tp",), ranks.num_ranks, 2, ranks.num_ranks // 2, "cpu"]


def a_mesh_that_does_not_fit() -> None:
    init_distributed((3, 1), ("dp", "tp"), device="cpu")


def test_init_distributed_refuses_a_shape_that_does_not_fit(ranks: Ranks) -> None:
    said = f"holds 3 ranks, and there are {ranks.num_ranks}. Give a shape whose product is {ranks.num_ranks}"
    with pytest.raises(RankError, match=re.escape(said)):
        ranks(a_mesh_that_does_not_fit)


def test_init_distributed_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        RuntimeError, match="RANK is not set. Start the script with torchrun: torchrun --nproc-per-node"
    ):
        init_distributed(device="cpu")


def fails_on_the_last() -> None:
    if distributed.get_rank() == distributed.get_world_size() - 1:
        raise ValueError("as it should")
    distributed.barrier()


def dies() -> None:
    if distributed.get_rank() == 1:
        os._exit(7)
    distributed.barrier()


def test_an_error_on_one_rank_is_raised_here_and_the_next_call_works() -> None:
    ranks = Ranks(2)
    with pytest.raises(RankError, match="ValueError: as it should"):
        ranks(fails_on_the_last)
    assert len(ranks(meshes)) == ranks.num_ranks
    with pytest.raises(RankError, match="rank"):
        ranks(dies)
    ranks.stop()
