"""torch's CUDA kernels, as far as a machine without one can say: the calls fit the operators, with these shapes."""

from __future__ import annotations

import pytest
import torch

from gptoss_opt.kernels.attention.impl.torch_cuda import TorchEfficient, TorchFlash
from gptoss_opt.kernels.attention.tiled import TileCall
from gptoss_opt.kernels.attention.varlen import VarlenCall


@pytest.mark.parametrize("window", [None, 128])
def test_flash(window: int | None) -> None:
    q = torch.empty(30, 64, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(40, 8, 64, device="meta", dtype=torch.bfloat16)
    cu_seq_lens = torch.empty(3, device="meta", dtype=torch.int32)
    call, sinks = VarlenCall(cu_seq_lens, cu_seq_lens, 20, 30, 0.125, window), torch.empty(64, device="meta")
    out, lse = TorchFlash().forward(q, k, k, sinks, call)
    assert out.shape == q.shape
    assert lse.shape == (64, 30)
    grads = TorchFlash().backward(out, q, k, k, out, lse, call)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("masked", [True, False])
def test_efficient(masked: bool) -> None:
    q = torch.empty(8, 8, 33, 64, device="meta")
    k = torch.empty(8, 1, 47, 64, device="meta").expand(-1, 8, -1, -1)
    call = TileCall(torch.empty(1, 1, 33, 47, device="meta") if masked else None, False, 0.125)
    out, lse = TorchEfficient().forward(q, k, k, call)
    assert out.shape == q.shape
    assert lse.shape == (8, 8, 33)
    grads = TorchEfficient().backward(out, q, k, k, out, lse, call)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
