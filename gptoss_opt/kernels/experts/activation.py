"""The clamped SwiGLU of GPT-OSS, and its gradient.

With `gate` and `up` at the even and odd places of the last dimension, `gate` clamped to at most `limit`, `up` to
`[-limit, limit]`: `(up + 1) * gate * sigmoid(alpha * gate)` (gpt-oss model card, and its reference implementation).
"""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Plain torch: `gate_up` [N, 2 I] to [N, I]. Defines the semantics.

    Example:
        >>> swiglu(torch.tensor([[1.0, 0.0, 100.0, 100.0]]), alpha=1.702, limit=7.0)
        tensor([[ 0.8458, 55.9996]])
    """
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def swiglu_backward(d_out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """The gradient for `gate_up` [N, 2 I] of `d_out` [N, I]: zero where a clamp holds."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    sigmoid = torch.sigmoid(alpha * gate)
    d_gate = d_out * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
    d_up = d_out * gate * sigmoid
    inside = torch.stack((gate_up[..., ::2] <= limit, gate_up[..., 1::2].abs() <= limit), -1)
    return (torch.stack((d_gate, d_up), -1) * inside).flatten(-2)
