"""Experts inside a model on a GPU, packed and dense. Skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss_opt import explain, load, with_fast_experts, with_flash_attention, with_mxfp4_experts
from gptoss_opt.kernels.experts import PackedWeights, experts
from gptoss_opt.kernels.mxfp4 import pack
from gptoss_opt.testing import random_checkpoint
from tests.helpers import ids, loss_and_gradients, relative, tiny_model

pytestmark = pytest.mark.gpu

WRAPPERS = {"with_mxfp4_experts": with_mxfp4_experts, "with_fast_experts": with_fast_experts}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_model_computes_as_on_the_cpu(name: str) -> None:
    plain = tiny_model()
    loss, gradients = loss_and_gradients(plain, ids())
    model = WRAPPERS[name](copy.deepcopy(plain).cuda())
    assert explain(model).rows[0].backend != "reference"
    assert relative(model(ids().cuda()).logits.cpu(), plain(ids()).logits) < 1e-4
    on_gpu, found = loss_and_gradients(model, ids().cuda())
    torch.testing.assert_close(on_gpu.cpu(), loss, rtol=1e-4, atol=0)
    for key, gradient in found.items():
        assert relative(gradient.cpu(), gradients[key]) < 1e-3, key
    # Negative control: another input.
    assert relative(model(ids(seed=2).cuda()).logits.cpu(), plain(ids()).logits) > 0.1


def test_loads_packed_straight_to_the_gpu(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny")
    stack = with_mxfp4_experts(), with_flash_attention()
    on_cpu, on_gpu = (load(folder, *stack, device=device, dtype=torch.float32) for device in ("cpu", "cuda"))
    assert {p.device.type for p in on_gpu.parameters()} == {"cuda"}
    assert relative(on_gpu(ids().cuda()).logits.cpu(), on_cpu(ids()).logits) < 1e-4
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(on_gpu.generate(ids().cuda(), **options).cpu(), on_cpu.generate(ids(), **options))


@pytest.fixture
def layer() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A packed layer: 8 experts, hidden 256, intermediate 128."""
    packed = []
    for num_out, num_in in ((256, 256), (256, 128)):
        blocks, scales = pack(torch.randn(8, num_out, num_in) / num_in**0.5)
        packed.append(PackedWeights(blocks.cuda(), scales.cuda(), torch.randn(8, num_out).bfloat16().cuda()))

    def run(x: torch.Tensor, indices: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return experts(x, indices, routing_weights, *packed, alpha=1.702, limit=7.0, backend="triton")

    return run


def given(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, indices = torch.randn(tokens, 8, device="cuda").topk(2)
    return torch.randn(tokens, 256, device="cuda").bfloat16(), indices, scores.softmax(-1).bfloat16()


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_nothing_waits_for_the_gpu(layer: Callable[..., torch.Tensor], tokens: int) -> None:
    inputs = given(tokens)
    layer(*inputs)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_call_can_be_captured(layer: Callable[..., torch.Tensor]) -> None:
    inputs, others = given(4), given(4)
    layer(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*inputs)
    for here, new in zip(inputs, others, strict=True):
        here.copy_(new)
    graph.replay()
    assert torch.equal(out, layer(*others))
