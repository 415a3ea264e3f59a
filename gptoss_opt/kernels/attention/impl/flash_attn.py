"""The flash-attn packages as varlen kernels. Each is imported when it is first used, never before.

Only Python functions are called, by keyword: the compiled ones underneath change between releases. What was read:
flash_attn/flash_attn_interface.py (2.7, 2.8), hopper/flash_attn_interface.py (3), flash_attn/cute/interface.py (4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..varlen import VarlenCall


class FlashAttn2:
    """`flash_attn` 2.7 and newer: no sinks of its own."""

    knows_sinks = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q=q, k=k, v=v, dropout_p=0.0, causal=True, **_lengths(call), **_window(call, unlimited=-1)
        )
        return out, lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _flash_attn_varlen_backward(
            dout=d_out,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            dropout_p=0.0,
            causal=True,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_lengths(call),
            **_window(call, unlimited=-1),
        )
        return dq, dk, dv


class FlashAttn3:
    """`flash_attn_interface`, for Hopper: no sinks of its own."""

    knows_sinks = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(q=q, k=k, v=v, causal=True, **_lengths(call), **_window(call, unlimited=-1))
        return out, lse.contiguous()

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_backward

        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _flash_attn_backward(
            dout=d_out,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            is_causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_lengths(call),
            **_window(call, unlimited=-1),
        )
        return dq, dk, dv


class FlashAttn4:
    """`flash_attn.cute`: takes the sinks itself, in bfloat16, and its log-sum-exp includes them.

    Its backward gets no sinks: with the sinked output and log-sum-exp dq, dk and dv are exact without, and the sinks'
    own gradient is computed outside for all backends alike (early releases have none).
    """

    knows_sinks = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(
            q=q,
            k=k,
            v=v,
            causal=True,
            learnable_sink=sinks.to(torch.bfloat16),
            return_lse=True,
            **_lengths(call),
            **_window(call, unlimited=None),
        )
        return out, lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_bwd

        common = {**_lengths(call), **_window(call, unlimited=None)}
        dq, dk, dv, *_ = _flash_attn_bwd(q=q, k=k, v=v, out=out, dout=d_out, lse=lse, causal=True, **common)
        return dq, dk, dv


def _lengths(call: VarlenCall) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.cu_q,
        "cu_seqlens_k": call.cu_k,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "softmax_scale": call.scale,
    }


def _window(call: VarlenCall, unlimited: int | None) -> dict[str, int | None]:
    """A window of w keys, the query's own included, is w - 1 to the left."""
    left, right = (unlimited, unlimited) if call.window is None else (call.window - 1, 0)
    return {"window_size_left": left, "window_size_right": right}
