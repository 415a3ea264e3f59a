"""Layouts as data: without processes, the same in any order, and errors that name who asks for what cannot be."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_opt import Stack, compose, shard_experts, shard_tensor_parallel, with_mxfp4_experts
from gptoss_opt.layout import Axis, Layout, LayoutError, Split, dense_layout
from tests.helpers import tiny_model

SHAPES = {"20b": (24, 32), "120b": (36, 128)}
TABLE = {
    # shape, packed: bytes of the fullest of 1, 2, 4 and 8 ranks
    ("20b", True): (13761264768, 6883055232, 3443950464, 1724398080),
    ("20b", False): (41829514368, 20917180032, 10461012864, 5232929280),
    ("120b", True): (65248815744, 32637997440, 16332588288, 8179883712),
    ("120b", False): (233658313344, 116842746240, 58434962688, 29231070912),
}
HALVES = (range(2), range(2, 4))


def on_meta(shape: str) -> GptOssForCausalLM:
    layers, experts = SHAPES[shape]
    with torch.device("meta"):
        return GptOssForCausalLM(GptOssConfig(num_hidden_layers=layers, num_local_experts=experts)).to(torch.bfloat16)


def stacks(degree: int, packed: bool) -> Stack:
    both = compose(shard_tensor_parallel(degree=degree), shard_experts(degree=degree))
    return compose(both, with_mxfp4_experts()) if packed else both


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_of_many_ranks_needs_none_of_them(shape: str) -> None:
    assert not torch.distributed.is_initialized()
    model = on_meta(shape)
    begin = time.perf_counter()
    for packed in (True, False):
        layouts = [stacks(degree, packed).layout(model) for degree in (1, 2, 4, 8)]
        assert tuple(layout.max_bytes() for layout in layouts) == TABLE[shape, packed]
        assert layouts[1].axes == (Axis("tp", 2),)
    # All eight layouts of a shape take less than the two seconds that are asked of four.
    assert time.perf_counter() - begin < 2
    parameters = [name for name, _ in model.named_parameters()]
    assert list(layouts[0]) == parameters


def test_one_rank_holds_what_the_model_has() -> None:
    model = tiny_model()
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert dense_layout(model).max_bytes() == held == compose().layout(model).max_bytes()


def test_without_degree_or_processes_the_number_of_ranks_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no process group tells how many ranks there are. Give degree"):
        compose(shard_tensor_parallel()).layout(tiny_model())


def test_what_is_asked_for_commutes() -> None:
    claim, way = Split(0, "tp", HALVES, by="one"), Split(2, "tp", HALVES, gives_way=True, by="other")
    edits: list[Any] = [
        lambda layout: layout.split(["w"], claim),
        lambda layout: layout.split(["w"], way),
        lambda layout: layout.split(["w"], Split(1, "ep", HALVES)),
        lambda layout: layout.add_once(["b"], "tp"),
        lambda layout: layout.split(["b"], claim),
        lambda layout: layout.store(["w"], "mxfp4"),
        lambda layout: layout.add("a", (4, 2), beside="w", dims={0: 0}),
        lambda layout: layout.over(Axis("tp", 2)),
        lambda layout: layout.over(Axis("ep", 2)),
    ]
    expected = None
    for number, order in enumerate(itertools.permutations(edits)):
        if number % 997:
            continue
        layout = Layout()
        for edit in order:
            layout = edit(layout)
        found = {name: layout.form(name) for name in sorted(layout)}, layout.axes
        expected = expected or found
        assert found == expected
    assert expected is not None
    forms = expected[0]
    assert forms["w"].splits == (claim, Split(1, "ep", HALVES)), "the split that gives way still holds"
    assert forms["b"].added_once == (), "what is split over an axis is added on each of its ranks"
    assert [split.axis for split in forms["a"].splits] == ["tp"]
    assert forms["a"].partial == ("ep",)
    # Alone, the split that gives way holds, and the bias counts once.
    alone = Layout().split(["w"], way).add_once(["b"], "tp")
    assert alone.form("w").splits == (way,)
    assert alone.form("b").added_once == ("tp",)


@pytest.mark.parametrize("order", [1, -1])
def test_splitting_twice_over_one_axis_names_both(order: int) -> None:
    layout = Layout()
    for author in ("with_one()", "with_other(rank=2)")[::order]:
        layout = replace(layout, author=author).split(["w"], Split(len(author) % 2, "tp", HALVES))
    with pytest.raises(LayoutError) as error:
        layout.form("w")
    assert "with_one()" in str(error.value)
    assert "with_other(rank=2)" in str(error.value)
    assert "both split w over axis 'tp'. Give each its own axis of a mesh" in str(error.value)


def test_one_dimension_over_two_axes_is_an_error() -> None:
    layout = Layout().split(["w"], Split(0, "tp", HALVES, by="with_one()"))
    layout = layout.split(["w"], Split(0, "ep", HALVES, by="with_other()"))
    with pytest.raises(LayoutError, match=r"with_other\(\) and with_one\(\) both split dimension 0 of w"):
        layout.form("w")


def test_axes_that_are_no_axes_of_one_mesh() -> None:
    layout = Layout().over(Axis("tp", 2))
    assert layout.over(Axis("tp", 2)) == layout
    with pytest.raises(LayoutError, match="are no axes of one mesh"):
        layout.over(Axis("tp", 4))
    with pytest.raises(LayoutError, match="have tokens of their own by one wrapper"):
        layout.over(Axis("tp", 2, data_parallel=True))
