"""torch's own flash kernel on the CPU, as a tile kernel: float64, float32, bfloat16 and float16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiled import TileCall


class TorchCpu:
    """`aten::_scaled_dot_product_flash_attention_for_cpu` and its backward.

    Keys are handed over once per query head, as views. The kernel also takes fewer key heads than query heads, but
    then sums the gradients of a group in the dtype of the inputs: in bfloat16 twice the error, measured.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: TileCall) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, call.causal, attn_mask=call.mask, scale=call.scale
        )

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: TileCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, call.causal, attn_mask=call.mask, scale=call.scale
        )
