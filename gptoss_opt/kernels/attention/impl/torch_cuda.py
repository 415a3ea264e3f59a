"""torch's own kernels on CUDA: flash (half precision) for packed sequences, memory-efficient (any mask) for tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tiled import TileCall
from ..varlen import VarlenCall

LSE_ALIGNMENT = 32
BIAS_ALIGNMENT = 16


class TorchFlash:
    """`aten::_flash_attention_forward` and its backward, in varlen form."""

    knows_sinks = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *call[:4], 0.0, True, False, scale=call.scale, **_window(call.window)
        )
        return out, lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Without dropout the kernel reads neither of the two random states, but wants tensors.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        options = {"scale": call.scale, **_window(call.window)}
        return torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *call[:4], 0.0, True, rng_state, unused, **options
        )


def _window(window: int | None) -> dict[str, int]:
    """A window of w keys, the query's own included, is w - 1 to the left."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


class TorchEfficient:
    """`aten::_scaled_dot_product_efficient_attention` and its backward: takes any mask, and float32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: TileCall) -> tuple[Tensor, Tensor]:
        dtype, bias = q.dtype, _bias(call.mask, q, k)
        if bias is not None and bias.dtype != dtype:
            q, k, v = (x.to(bias.dtype) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, call.causal, scale=call.scale
        )
        return out.to(dtype), lse[..., : q.shape[2]]

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: TileCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel reads whole blocks of the log-sum-exp: the rows beyond the last query must weigh nothing.
        lse = pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=torch.inf).contiguous()
        seed = torch.empty((), dtype=torch.int64)
        dtype, bias = q.dtype, _bias(call.mask, q, k)
        if bias is not None and bias.dtype != dtype:
            d_out, q, k, v, out = (x.to(bias.dtype) for x in (d_out, q, k, v, out))
        # In half precision it takes the rows of the output to lie as [b, t, g, D], whatever their strides say.
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            d_out, q, k, v, bias, out, lse, seed, seed, 0.0, [True, True, True, False], call.causal, scale=call.scale
        )
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask in full shape [b, g, t, s], with rows aligned in memory."""
    if mask is None:
        return None
    length = k.shape[2]
    aligned = pad(mask, (0, -length % BIAS_ALIGNMENT))[..., :length]
    return aligned.expand(*q.shape[:3], length)
