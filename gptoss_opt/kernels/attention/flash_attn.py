"""The flash-attn packages as varlen kernels. Each is imported when it is first used, never before.

Only Python functions are called, by keyword: the compiled ones underneath change between releases. What was read:
flash_attn/flash_attn_interface.py (2.7, 2.8), hopper/flash_attn_interface.py (3), flash_attn/cute/interface.py (4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .varlen import Lengths


class FlashAttn2:
    """`flash_attn` 2.7 and newer: no sinks of its own."""

    knows_sinks = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, lengths: Lengths, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(q=q, k=k, v=v, **self._common(lengths, scale, window))
        return out, lse

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Lengths,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
        _flash_attn_varlen_backward(
            dout=d_out,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            **grads,
            **self._common(lengths, scale, window),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads["dq"], grads["dk"], grads["dv"]

    def _common(self, lengths: Lengths, scale: float, window: int | None) -> dict[str, Any]:
        return {
            "cu_seqlens_q": lengths.cu_q,
            "cu_seqlens_k": lengths.cu_k,
            "max_seqlen_q": lengths.max_q,
            "max_seqlen_k": lengths.max_k,
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": True,
            "window_size_left": -1 if window is None else window - 1,
            "window_size_right": -1 if window is None else 0,
        }


class FlashAttn3:
    """`flash_attn_interface`, for Hopper: no sinks of its own."""

    knows_sinks = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, lengths: Lengths, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(q=q, k=k, v=v, causal=True, **self._common(lengths, scale, window))
        return out, lse.contiguous()

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Lengths,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_backward

        grads = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
        _flash_attn_backward(
            dout=d_out,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            is_causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **grads,
            **self._common(lengths, scale, window),
        )
        return grads["dq"], grads["dk"], grads["dv"]

    def _common(self, lengths: Lengths, scale: float, window: int | None) -> dict[str, Any]:
        return {
            "cu_seqlens_q": lengths.cu_q,
            "cu_seqlens_k": lengths.cu_k,
            "max_seqlen_q": lengths.max_q,
            "max_seqlen_k": lengths.max_k,
            "softmax_scale": scale,
            "window_size_left": -1 if window is None else window - 1,
            "window_size_right": -1 if window is None else 0,
        }


class FlashAttn4:
    """`flash_attn.cute`: takes the sinks itself, in bfloat16, and its log-sum-exp includes them.

    Its backward gets no sinks: with the sinked output and log-sum-exp dq, dk and dv are exact without, and the sinks'
    own gradient is computed outside for all backends alike (early releases have none).
    """

    knows_sinks = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, lengths: Lengths, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        sink = sinks.to(torch.bfloat16)
        out, lse, *_ = _flash_attn_fwd(
            q=q, k=k, v=v, learnable_sink=sink, return_lse=True, **self._common(lengths, scale, window)
        )
        return out, lse

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Lengths,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_bwd

        dq, dk, dv, *_ = _flash_attn_bwd(
            q=q, k=k, v=v, out=out, dout=d_out, lse=lse, **self._common(lengths, scale, window)
        )
        return dq, dk, dv

    def _common(self, lengths: Lengths, scale: float, window: int | None) -> dict[str, Any]:
        return {
            "cu_seqlens_q": lengths.cu_q,
            "cu_seqlens_k": lengths.cu_k,
            "max_seqlen_q": lengths.max_q,
            "max_seqlen_k": lengths.max_k,
            "softmax_scale": scale,
            "causal": True,
            "window_size_left": None if window is None else window - 1,
            "window_size_right": None if window is None else 0,
        }
