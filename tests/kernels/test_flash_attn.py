"""The adapters of the flash-attn packages call functions with the packages' signatures, with what they ask for.

The stand-ins below have the signatures of the released functions (flash_attn 2.8, flash_attn_interface 3,
flash_attn.cute 4) and compute in plain products.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_opt.kernels.attention import AttentionRequest, Rules, varlen
from gptoss_opt.kernels.attention.backends import BACKENDS, FlashAttnPackage
from gptoss_opt.kernels.attention.impl.flash_attn import FLASH_ATTN_2, FLASH_ATTN_3, FlashAttn4
from gptoss_opt.kernels.attention.impl.reference import reference_attention
from gptoss_opt.kernels.attention.impl.torch_cpu import TorchCpu
from gptoss_opt.kernels.attention.varlen import VarlenCall
from tests.helpers import differentiate, relative
from tests.kernels import emulated
from tests.kernels.problems import SCALE, inputs, visibles


def window_of(left: int | None, right: int | None) -> int | None:
    """What a window means to the packages: `left` keys before the query's own; -1 or None is unlimited."""
    if left in (-1, None):
        assert right in (-1, None, 0)
        return None
    assert right == 0
    return left + 1


def fa2_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, ...]:
    assert causal
    assert dropout_p == 0.0
    window = window_of(window_size_left, window_size_right)
    call = VarlenCall(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window)
    out, lse = emulated.forward(q, k, v, call)
    return out, lse, torch.empty(0), torch.empty(2)


def fa2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    assert causal
    assert softmax_lse.is_contiguous()
    window = window_of(window_size_left, window_size_right)
    call = VarlenCall(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window)
    grads = emulated.backward(dout, q, k, v, out, softmax_lse, call)
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)
    return torch.empty(0)


def fa3_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[Tensor, ...]:
    assert causal
    window = window_of(window_size_left, window_size_right)
    call = VarlenCall(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window)
    out, lse = emulated.forward(q, k, v, call)
    return out, lse, torch.empty(0), torch.empty(0)


def fa3_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    assert is_causal
    window = window_of(window_size_left, window_size_right)
    call = VarlenCall(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window)
    grads = emulated.backward(dout, q, k, v, out, softmax_lse, call)
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)
    return torch.empty(0)


def fa4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor | None, ...]:
    assert causal
    assert return_lse
    assert learnable_sink is not None
    assert learnable_sink.dtype == torch.bfloat16
    window = window_of(window_size_left, window_size_right)
    call = VarlenCall(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window)
    return *emulated.forward(q, k, v, call, learnable_sink), None, None


def fa4_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    assert causal
    window = window_of(window_size_left, window_size_right)
    call = VarlenCall(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window)
    return emulated.backward(dout, q, k, v, out, lse, call)


STAND_INS = {
    "fa2": (
        FLASH_ATTN_2,
        "flash_attn.flash_attn_interface",
        {"_flash_attn_varlen_forward": fa2_forward, "_flash_attn_varlen_backward": fa2_backward},
    ),
    "fa3": (
        FLASH_ATTN_3,
        "flash_attn_interface",
        {"_flash_attn_forward": fa3_forward, "_flash_attn_backward": fa3_backward},
    ),
    "fa4": (
        FlashAttn4(),
        "flash_attn.cute.interface",
        {"_flash_attn_fwd": fa4_forward, "_flash_attn_bwd": fa4_backward},
    ),
}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["nothing hidden", "left padding", "packed"])
@pytest.mark.parametrize("name", STAND_INS)
def test_adapters(name: str, kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, module_name, functions = STAND_INS[name]
    parts = module_name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    for function_name, function in functions.items():
        setattr(sys.modules[module_name], function_name, function)
    q, k, v, sinks = inputs(33, 33)
    # What flash-attn 4 is given is bfloat16: compare on sinks that are.
    sinks = sinks.bfloat16().double()
    rules, d_out = Rules(SCALE, window, visibles(33, 33)[kind]), torch.randn_like(q)
    expected = differentiate(lambda *x: reference_attention(*x, rules), [q, k, v, sinks], d_out)
    out, lse = varlen.forward(kernel, TorchCpu(), q, k, v, sinks, rules)
    grads = varlen.backward(kernel, TorchCpu(), d_out, q, k, v, out, lse, rules)
    for actual, wanted in zip((out, *grads), expected, strict=False):
        assert relative(actual, wanted) < 1e-10


def package(name: str) -> FlashAttnPackage:
    return next(backend for backend in BACKENDS if backend.name == name)


def request_with(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{"device_type": "cuda", "dtype": torch.bfloat16, "head_dim": 64, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("fa2", {"device_type": "cpu"}, "needs CUDA, and the model is on cpu"),
        ("fa2", {"dtype": torch.float32}, "and the model is in torch.float32"),
        ("fa4", {"dtype": torch.float16}, "takes torch.bfloat16, and the model is in torch.float16"),
        ("fa3", {"head_dim": 60}, "a multiple of 8, up to 256, not 60"),
        ("fa3", {}, "the package flash-attn-3 is not installed"),
        ("torch", {"device_type": "mps"}, "on mps"),
        ("torch", {"dtype": torch.float64}, "torch.float64 on cuda"),
    ],
)
def test_why_not(name: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in str(package(name).why_not(request_with(**changes)))


def test_versions_and_gpus_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_opt.kernels.attention.backends.metadata.version", lambda name: "2.6.3")
    assert "needs flash-attn 2.7.1 or newer, not 2.6.3" in str(package("fa2").why_not(request_with()))
    monkeypatch.setattr("gptoss_opt.kernels.attention.backends.metadata.version", lambda name: "2.8.3")
    assert "2.8.3 has no module flash_attn" in str(package("fa2").why_not(request_with()))
    monkeypatch.setattr("gptoss_opt.kernels.attention.backends.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "does not run on a GPU of compute capability 7.x" in str(package("fa2").why_not(request_with()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert package("fa2").why_not(request_with()) is None
