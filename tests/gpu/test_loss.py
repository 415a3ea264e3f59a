"""The loss in chunks on a GPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from gptoss_opt import with_chunked_loss
from gptoss_opt.kernels.loss import chunked_cross_entropy
from tests.helpers import assert_as_exact, differentiate, ids, loss_and_gradients, relative, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_all_logits_at_once(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(300, 64).to("cuda", dtype), torch.randn(5000, 64).to("cuda", dtype)
    labels = torch.randint(5000, (300,), device="cuda")
    labels[::3] = -100

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(None, hidden, labels, [weight], vocabulary=5000, chunk=70)

    def whole(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden, weight)
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    d_loss = torch.ones((), device="cuda")
    exact = differentiate(whole, [hidden.double(), weight.double()], d_loss)
    found, base = (differentiate(run, [hidden, weight], d_loss) for run in (ours, whole))
    assert_as_exact(("loss", "d_hidden", "d_weight"), found, base, exact)


def test_memory_is_that_of_a_chunk() -> None:
    hidden, weight = (torch.randn(rows, 64, device="cuda", requires_grad=True) for rows in (2048, 100_000))
    labels = torch.randint(100_000, (2048,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunked_cross_entropy(None, hidden, labels, [weight], vocabulary=100_000, chunk=64).backward()
    assert torch.cuda.max_memory_allocated() - before < 2048 * 100_000 * 4 / 4


def test_a_model_computes_as_on_the_cpu() -> None:
    loss, gradients = loss_and_gradients(tiny_model(), ids())
    model = with_chunked_loss(tiny_model(), chunk_tokens=7).cuda().train()
    found_loss, found = loss_and_gradients(model, ids().cuda())
    torch.testing.assert_close(found_loss.cpu(), loss, rtol=1e-4, atol=0)
    assert max(relative(found[name].cpu(), gradient) for name, gradient in gradients.items()) < 1e-3
