"""The kernels that only a GPU has, inside and outside a model. Skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

from gptoss_opt import explain, with_flash_attention
from gptoss_opt.kernels.attention import BACKENDS, AttentionRequest, Visible, attention
from tests.helpers import WINDOW, assert_within_budget, differentiate, ids, loss_and_gradients, relative, tiny_model
from tests.kernels.problems import GEOMETRY_20B, inputs, visibles

pytestmark = pytest.mark.gpu

SCALE = GEOMETRY_20B[2] ** -0.5


def available(dtype: torch.dtype) -> list[str]:
    """The backends that serve here, the reference apart."""
    wanted = AttentionRequest("cuda", dtype, GEOMETRY_20B[2])
    return [backend.name for backend in BACKENDS if not backend.only_named and backend.why_not(wanted) is None]


def on_gpu(visible: Visible) -> Visible:
    return Visible(*(None if x is None else x.cuda() for x in visible))


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "kind"),
    [(n, s, kind) for n, s in ((1, 400), (300, 300), (150, 400)) for kind in visibles(n, s)],
)
def test_error_budget(num_queries: int, num_keys: int, kind: str, dtype: torch.dtype, window: int | None) -> None:
    visible = on_gpu(visibles(num_queries, num_keys, heads=64)[kind])
    tensors = inputs(num_queries, num_keys, dtype, "cuda", GEOMETRY_20B)
    for backend in available(dtype):
        assert_within_budget(
            lambda *x, backend=backend: attention(*x, scale=SCALE, window=window, visible=visible, backend=backend),
            tensors,
            visible,
            SCALE,
            window,
        )


def test_memory_is_linear() -> None:
    used = []
    for length in (4096, 8192):
        tensors = inputs(length, length, torch.bfloat16, "cuda", GEOMETRY_20B)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        differentiate(lambda *x: attention(*x, scale=SCALE), tensors, torch.randn_like(tensors[0]))
        used.append(torch.cuda.max_memory_allocated() - before)
    assert used[1] < 2.2 * used[0]


def test_a_decode_step_can_be_captured() -> None:
    q, k, v, sinks = inputs(1, 400, torch.bfloat16, "cuda", GEOMETRY_20B)
    visible = Visible(q_start=torch.tensor(50, device="cuda"))

    def step() -> torch.Tensor:
        with torch.no_grad():
            return attention(q, k, v, sinks, scale=SCALE, window=64, visible=visible)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for slot in (10, 300):
        visible.q_start.fill_(slot)
        graph.replay()
        assert torch.equal(out, step())


def test_model() -> None:
    eager = tiny_model().cuda()
    fast = with_flash_attention(copy.deepcopy(eager))
    print(explain(fast))
    mask = torch.ones(3, 4 * WINDOW, dtype=torch.long)
    mask[1, :3], mask[2, : 2 * WINDOW + 1] = 0, 0
    inputs = {"input_ids": ids(3, 4 * WINDOW).cuda(), "attention_mask": mask.cuda()}
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(fast.generate(**inputs, **options), eager.generate(**inputs, **options))
    _, expected = loss_and_gradients(eager, ids().cuda())
    for name, gradient in loss_and_gradients(fast, ids().cuda())[1].items():
        assert relative(gradient, expected[name]) < 1e-4, name
    low = with_flash_attention(tiny_model(torch.bfloat16, num_experts_per_tok=4).cuda())
    plain = tiny_model(torch.bfloat16, num_experts_per_tok=4).cuda()
    truth = plain.float()(ids().cuda()).logits
    assert relative(low(ids().cuda()).logits, truth) < 0.1
