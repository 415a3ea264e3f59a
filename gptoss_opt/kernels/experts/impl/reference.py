"""The experts in plain torch, one after the other: they define the semantics and run everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ...low_rank import LowRank
from ...tracing import needs_operator
from ..clamp import passes_at_limits
from ..one_by_one import input_gradient, product
from ..routes import of_expert
from ..weights import ExpertsRequest, ExpertWeights, Fused


class Reference:
    """One expert at a time; packed weights are dequantised."""

    name = "reference"
    only_named = False

    def why_not(self, request: ExpertsRequest) -> str | None:
        """None: it runs everywhere."""
        return None

    def fused_for(self, x: Tensor, indices: Tensor, weights: ExpertWeights) -> Fused | None:
        """None: each step is a call."""
        return None

    def as_operator(self, x: Tensor, weights: ExpertWeights) -> bool:
        return needs_operator(x, *weights.tensors, weights.bias)

    def why_waits(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return f"the backend {self.name!r} asks how many rows each expert has"

    def forward(self, x: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
        return product(x, offsets, weights)

    def backward(self, d_y: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
        return input_gradient(d_y, offsets, weights)

    def swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(alpha * gate))

    def swiglu_backward(self, d_h: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * gate)
        d_gate = d_h * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
        d_up = d_h * gate * sigmoid
        below = torch.le if passes_at_limits() else torch.lt
        inside = torch.stack((below(gate_up[..., ::2], limit), below(gate_up[..., 1::2].abs(), limit)), -1)
        return (torch.stack((d_gate, d_up), -1) * inside).flatten(-2)


class ReferenceDense(Reference):
    """Dense weights, differentiated by autograd."""

    def as_operator(self, x: Tensor, weights: ExpertWeights) -> bool:
        """Never: autograd sees plain operations."""
        return False

    def forward(self, x: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
        parts, last = [], 0
        for e, begin, end in of_expert(offsets):
            y = x[begin:end] @ weights.expert(e, x)
            parts.append(y if weights.bias is None else y + weights.bias[e])
            last = end
        # Rows of no expert: zeros, but part of the graph, as all else may be missing.
        rest = x[last:].masked_fill(x.new_ones((), dtype=torch.bool), 0) @ weights.expert(0, x)
        if weights.bias is not None:
            rest = rest + weights.bias[0].masked_fill(x.new_ones((), dtype=torch.bool), 0)
        return torch.cat([*parts, rest])


REFERENCE, REFERENCE_DENSE = Reference(), ReferenceDense()


def all_experts(
    x: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    alpha: float,
    limit: float,
    changes: tuple[LowRank | None, LowRank | None],
) -> Tensor:
    """As `experts` of this package, by every expert on every token, which all transforms of torch.func go through."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        share = torch.where(indices == e, routing_weights.to(x.dtype), 0).sum(-1, keepdim=True)
        hidden = REFERENCE.swiglu(_affine(x, gate_up, changes[0], e), alpha, limit)
        out = out + share * _affine(hidden, down, changes[1], e)
    return out


def _affine(x: Tensor, weights: ExpertWeights, change: LowRank | None, e: int) -> Tensor:
    y = x @ weights.expert(e, x)
    if weights.bias is not None:
        y = y + weights.bias[e]
    return y if change is None else change.expert(e).added_to(y, x)
