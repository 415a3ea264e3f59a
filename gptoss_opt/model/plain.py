"""A layer's parts as transformers computes them eagerly, in any dtype, from the weights that a wrapped model holds.

They share no kernel with the wrappers: plain products, one expert after the other, the whole matrix of scores.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from .changes import change_of
from .experts import PROJECTIONS, weights_held

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


def additive_mask(seen: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Causality, a window and padding as what is added to scores: [B, 1, T, T].

    Args:
        seen: bool [B, T]; False is padding.
        window: how many tokens each sees, its own included; None is all.
        dtype: of the mask.
    """
    length = seen.shape[1]
    place = torch.arange(length, device=seen.device)
    back = place[:, None] - place
    visible = (back >= 0) & (back < (length if window is None else window)) & seen[:, None, :]
    return torch.zeros(visible.shape, dtype=dtype, device=seen.device).masked_fill_(~visible, torch.finfo(dtype).min)[
        :, None
    ]


def plain_attention(module: Any, hidden: Tensor, places: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
    """What attention gives for hidden states [B, T, H], in their dtype.

    Args:
        module: the attention of a layer, with adapters if it has some.
        hidden: what it is given.
        places: cosines and sines of the positions, [B or 1, T, D / 2].
        seen: bool [B, T]; False is padding.
    """
    config = copy.deepcopy(module.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        plain: Any = GptOssAttention(config, module.layer_idx)
    state = {"sinks": module.sinks.detach()}
    for name in LINEARS:
        linear = getattr(module, name)
        state[f"{name}.weight"] = _weight(linear, hidden.dtype)
        if linear.bias is not None:
            state[f"{name}.bias"] = linear.bias.detach()
    plain.load_state_dict({name: tensor.to(hidden.dtype) for name, tensor in state.items()}, assign=True)
    mask = additive_mask(seen, module.sliding_window, hidden.dtype)
    cos, sin = (one.to(hidden.dtype) for one in places)
    out: Tensor = plain.eval()(hidden, position_embeddings=(cos, sin), attention_mask=mask)[0]
    return out


def _weight(linear: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer with its adapters, ours or peft's, in a dtype."""
    weight: Tensor = getattr(linear, "base_layer", linear).weight.detach().to(dtype)
    if (change := change_of(linear)) is not None:
        weight = weight + change.delta().detach().to(dtype)
    if hasattr(linear, "get_delta_weight") and not linear.merged and not linear.disable_adapters:
        for name in linear.active_adapters:
            weight = weight + linear.get_delta_weight(name).detach().to(dtype)
    return weight


def plain_embedding(module: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that an embedding gives for tokens, in a dtype."""
    return functional.embedding(tokens, _weight(module, dtype))


def plain_norm(module: Any, hidden: Tensor) -> Tensor:
    """What a norm gives for hidden states, in their dtype."""
    scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    normed: Tensor = module.weight.detach().to(hidden.dtype) * scaled
    return normed


def plain_rotary(module: Any, places: Tensor) -> Tensor:
    """Cosines and sines of positions, one behind the other, in the dtype of the positions."""
    angles = places[..., None] * module.inv_freq.to(places.dtype)
    scaling: float = module.attention_scaling
    return torch.cat([angles.cos(), angles.sin()], -1) * scaling


def plain_router(module: Any, hidden: Tensor) -> Tensor:
    """The logits [N, E] of a router for [N, H], in its dtype."""
    return functional.linear(hidden, module.weight.detach().to(hidden.dtype), module.bias.detach().to(hidden.dtype))


def plain_experts(module: Any, hidden: Tensor, indices: Tensor, routing_weights: Tensor) -> Tensor:
    """The experts' weighted sums [N, H] for [N, H], experts and weights [N, K], in the dtype of the hidden states."""
    out = torch.zeros_like(hidden)
    for expert in indices.unique().tolist():
        tokens, which = torch.where(indices == expert)
        both = _projected(module, PROJECTIONS[0], expert, hidden[tokens])
        gate, up = both[..., ::2].clamp(max=module.limit), both[..., 1::2].clamp(-module.limit, module.limit)
        activated = (up + 1) * (gate * torch.sigmoid(gate * module.alpha))
        found = _projected(module, PROJECTIONS[1], expert, activated)
        out = out.index_add(0, tokens, found * routing_weights[tokens, which, None].to(hidden.dtype))
    return out


def _projected(module: Any, projection: str, expert: int, rows: Tensor) -> Tensor:
    weight = weights_held(module, projection).expert(expert, rows).detach().to(rows.dtype)
    change = change_of(module, f"{projection}_")
    if change is not None:
        weight = weight + change.expert(expert).delta().detach().mT.to(rows.dtype)
    bias: Tensor = getattr(module, f"{projection}_bias")[expert].detach()
    return rows @ weight + bias.to(rows.dtype)


def plain_head(model: Any, hidden: Tensor) -> Tensor:
    """The logits of hidden states, in their dtype."""
    head: nn.Linear = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
    return functional.linear(hidden, head.weight.detach().to(hidden.dtype), bias)
