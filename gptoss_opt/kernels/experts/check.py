"""What a backend is handed: it reads as far as sizes say, wherever that leads, so all is looked at before."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..low_rank import LowRank
from ..mxfp4 import BLOCK
from .weights import DenseWeights, ExpertWeights

Expected = tuple[str, Tensor, tuple[int, ...]]
"""A tensor, what it is called, and the shape it must have."""


def check(
    x: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    changes: tuple[LowRank | None, LowRank | None],
) -> None:
    """Raise `ValueError` unless tokens, routes and weights fit each other and lie on one device."""
    num_experts, hidden, pairs = gate_up.shape
    routes = (x.shape[0], indices.shape[-1])
    expected = [
        ("hidden_states", x, (x.shape[0], hidden)),
        ("router_indices", indices, routes),
        ("routing_weights", routing_weights, routes),
        *_weights("gate_up_proj", gate_up, num_experts, hidden, pairs),
        *_weights("down_proj", down, num_experts, pairs // 2, hidden),
    ]
    if changes[0] is not None:
        expected += _factors("gate_up_proj", changes[0], num_experts, hidden, pairs)
    if changes[1] is not None:
        expected += _factors("down_proj", changes[1], num_experts, pairs // 2, hidden)
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, and must be {list(shape)} here.")
        if tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device}, and the tokens are on {x.device}. Move the whole model, or let "
                "accelerate's hooks bring its weights."
            )


def _weights(name: str, weights: ExpertWeights, num_experts: int, num_in: int, num_out: int) -> Iterator[Expected]:
    if isinstance(weights, DenseWeights):
        yield name, weights.weight, (num_experts, num_in, num_out)
    else:
        blocks = (num_experts, num_out, num_in // BLOCK)
        yield f"{name}_blocks", weights.blocks, (*blocks, BLOCK // 2)
        yield f"{name}_scales", weights.scales, blocks
    if weights.bias is not None:
        yield f"{name}_bias", weights.bias, (num_experts, num_out)


def _factors(name: str, change: LowRank, num_experts: int, num_in: int, num_out: int) -> Iterator[Expected]:
    rank = change.a.shape[1]
    yield f"{name}_lora_A", change.a, (num_experts, rank, num_in)
    yield f"{name}_lora_B", change.b, (num_experts, num_out, rank)
