"""The flash-attn packages as varlen kernels. Each is imported when it is first used, never before.

Only Python functions are called, by keyword: the compiled ones underneath change between releases. What was read:
flash_attn/flash_attn_interface.py (2.7, 2.8), hopper/flash_attn_interface.py (3), flash_attn/cute/interface.py (4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..varlen import VarlenCall


@dataclass(frozen=True)
class FlashAttn:
    """A package that knows no sinks.

    Attributes:
        module: where its functions are.
        functions: the names of its forward and of its backward.
        forward_options, backward_options: what each takes besides.
    """

    module: str
    functions: tuple[str, str]
    forward_options: Mapping[str, Any]
    backward_options: Mapping[str, Any]
    knows_sinks: bool = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        function = getattr(import_module(self.module), self.functions[0])
        out, lse, *_ = function(q=q, k=k, v=v, **self.forward_options, **_arguments(call, unlimited=-1))
        return out, lse.contiguous()

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        deterministic = torch.are_deterministic_algorithms_enabled()
        options = {**self.backward_options, **_arguments(call, unlimited=-1)}
        tensors = {"dout": d_out, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
        getattr(import_module(self.module), self.functions[1])(**tensors, deterministic=deterministic, **options)
        return dq, dk, dv


FLASH_ATTN_2 = FlashAttn(
    "flash_attn.flash_attn_interface",
    ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    {"dropout_p": 0.0, "causal": True},
    {"dropout_p": 0.0, "causal": True, "softcap": 0.0, "alibi_slopes": None},
)
FLASH_ATTN_3 = FlashAttn(
    "flash_attn_interface", ("_flash_attn_forward", "_flash_attn_backward"), {"causal": True}, {"is_causal": True}
)


class FlashAttn4:
    """`flash_attn.cute`: takes the sinks itself, in bfloat16, and its log-sum-exp includes them.

    Its backward gets no sinks: with the sinked output and log-sum-exp dq, dk and dv are exact without, and the sinks'
    own gradient is computed outside for all backends alike (early releases have none).
    """

    knows_sinks = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        options = {"learnable_sink": sinks.to(torch.bfloat16), "return_lse": True, **_arguments(call, unlimited=None)}
        out, lse, *_ = _flash_attn_fwd(q=q, k=k, v=v, causal=True, **options)
        return out, lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_bwd

        options = _arguments(call, unlimited=None)
        dq, dk, dv, *_ = _flash_attn_bwd(q=q, k=k, v=v, out=out, dout=d_out, lse=lse, causal=True, **options)
        return dq, dk, dv


def _arguments(call: VarlenCall, unlimited: int | None) -> dict[str, Any]:
    """What all of them take. A window of w keys, the query's own included, is w - 1 to the left."""
    left, right = (unlimited, unlimited) if call.window is None else (call.window - 1, 0)
    return {
        "cu_seqlens_q": call.cu_q,
        "cu_seqlens_k": call.cu_k,
        "max_seqlen_q": call.max_q,
        "max_seqlen_k": call.max_k,
        "softmax_scale": call.scale,
        "window_size_left": left,
        "window_size_right": right,
    }
