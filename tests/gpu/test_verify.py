"""`verify` on a GPU: every backend that serves there beside plain computations. Skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

from gptoss_opt import compose, verify, with_fast_experts, with_flash_attention, with_lora, with_mxfp4_experts
from gptoss_opt.kernels.experts import ExpertsRequest, experts
from gptoss_opt.kernels.experts.impl.torch_grouped import TORCH_GROUPED
from gptoss_opt.kernels.experts.weights import DenseWeights
from tests.helpers import relative, tiny_model

pytestmark = pytest.mark.gpu

STACKS = {
    "packed": compose(with_flash_attention(), with_mxfp4_experts()),
    "dense": compose(with_flash_attention(), with_fast_experts()),
    "adapters": compose(with_flash_attention(), with_mxfp4_experts(), with_lora(rank=4)),
}


@pytest.mark.parametrize("name", STACKS)
def test_what_is_right(name: str) -> None:
    # Heads and rows as wide as the kernels take.
    model = tiny_model(torch.bfloat16, hidden_size=128, intermediate_size=128, head_dim=64).cuda()
    found = verify(STACKS[name](model), gradients=True)
    print(found)
    assert found.right, found.verdict


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_dense_experts_in_few_launches(tokens: int) -> None:
    """Without gradients, beside the same with them."""
    gate_up, down = (
        DenseWeights(torch.randn(8, 64, n, device="cuda").bfloat16() / 8, torch.randn(8, n, device="cuda").bfloat16())
        for n in (128, 64)
    )
    assert TORCH_GROUPED.why_not(ExpertsRequest("cuda", torch.bfloat16, (64, 64))) is None
    x = torch.randn(tokens, 64, device="cuda").bfloat16()
    scores, indices = torch.randn(tokens, 9, device="cuda").topk(3)  # with an expert that is not here
    arguments = (indices, scores.softmax(-1).bfloat16(), gate_up, down)
    options = {"alpha": 1.702, "limit": 7.0, "backend": "torch"}
    with torch.no_grad():
        few = experts(x, *arguments, **options)
    many = experts(copy.copy(x).requires_grad_(), *arguments, **options)
    assert relative(few, many) < 2e-2
    assert relative(few.roll(1, -1), many) > 0.1
