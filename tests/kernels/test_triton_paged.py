"""The Triton kernel of attention on pages, in Triton's interpreter, and compiled for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptoss_opt.kernels.paged_attention import choose_backend
from gptoss_opt.kernels.paged_attention.impl import triton as paged_triton
from tests.kernels.test_paged import problem
from tests.kernels.triton_apart import DEVICE, SHARED_MEMORY, compiled, in_a_process_of_its_own, needs_triton


@needs_triton
@pytest.mark.parametrize(
    ("interpret", "prefix"), [("1", "check"), ("0", "compile"), pytest.param("0", "check", marks=pytest.mark.gpu)]
)
def test_in_a_process_of_its_own(interpret: str, prefix: str) -> None:
    in_a_process_of_its_own(interpret, prefix, __file__)


def test_it_is_chosen_where_it_serves() -> None:
    assert paged_triton.why_not("cpu", torch.bfloat16) == "needs CUDA, and the model is on cpu"
    assert choose_backend("cuda", torch.float64, 64) == "torch"
    if paged_triton.why_not("cuda", torch.bfloat16) is None:
        assert choose_backend("cuda", torch.bfloat16, 64) == "triton"


SHAPES: list[dict[str, Any]] = [
    {},
    {"heads": (16, 1), "dim": 64, "page_size": 16},
    {"heads": (6, 2), "dim": 48, "page_size": 1},
    {"lengths": (1, 700, 1030), "firsts": (0, 0, 4), "page_size": 64},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 8, 300])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def check_decode(shape: int, window: int | None, dtype: torch.dtype) -> None:
    one = problem(dtype, **SHAPES[shape])
    paged = one.paged._replace(
        block_table=one.paged.block_table.to(DEVICE),
        context_starts=one.paged.context_starts.to(DEVICE),
        context_lens=one.paged.context_lens.to(DEVICE),
    )
    keys, values = (x[0].to(DEVICE) for x in (one.paged.keys, one.paged.values))
    found = paged_triton.decode(one.q.to(DEVICE), keys, values, one.sinks.to(DEVICE), paged, 0.2, window)
    truth = one.expected(0.2, window)
    error = float((found.cpu().double() - truth).norm() / truth.norm())
    # In bfloat16 the weights are rounded before they meet the values, and so is the result.
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), error
    assert float((found.cpu().double() - one.expected(0.2, 5)).norm() / truth.norm()) > 5e-2


def check_that_keys_are_cut_into_parts() -> None:
    assert paged_triton.num_parts(3, 2, 1088) == 4
    assert paged_triton.num_parts(400, 2, 1088) == 1


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("element", ["bf16", "fp16", "fp32"])
def compile_decode(element: str, capability: int) -> None:
    pointers = [*[f"*{element}"] * 3, *["*i32"] * 3, *["*fp32"] * 3]
    sizes = {"GROUP": 8, "DIM": 64, "PAGE": 16, "HEADS": 16, "DIMS": 64, "KEYS": paged_triton.KEYS}
    kernel = paged_triton._kernels().decode_kernel
    made = compiled(kernel, capability, [*pointers, *["i32"] * 4, "fp32"], sizes)
    assert made.metadata.shared <= SHARED_MEMORY[capability]
