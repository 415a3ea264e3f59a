"""Which part of attention goes to the sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

from ..distributed import local_part
from ..kernels.attention import Visible


@torch.no_grad()
def sink_share(module: Any, given: dict[str, Any]) -> Tensor | None:
    """Which part of the attention of the last tokens goes to the sinks, on average over rows and heads.

    Args:
        module: the attention of a layer; on a rank that holds some of its heads, the average is over those.
        given: the keywords that it was called with. None is the answer where they do not hold all keys, beside a cache
            or pages, or under a mask; and where the weights are brought for the forward alone, as accelerate does.
    """
    mask, hidden = given.get("attention_mask"), given["hidden_states"]
    cache, plain = given.get("past_key_values"), mask is None or (isinstance(mask, Visible) and mask.everything)
    # By now the cache has what was computed as well.
    earlier = 0 if cache is None else cache.get_seq_length(module.layer_idx) - hidden.shape[1]
    if earlier or not plain or module.sinks.is_meta:
        return None
    length = min(hidden.shape[1], module.sliding_window or hidden.shape[1])
    cos, sin = (one[:, -length:] for one in given["position_embeddings"])
    query, key = (
        linear(rows).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for linear, rows in ((module.q_proj, hidden[:, -1:]), (module.k_proj, hidden[:, -length:]))
    )
    key = apply_rotary_pos_emb(key, key, cos, sin)[0].repeat_interleave(module.num_key_value_groups, 1)
    query = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])[0]
    scores = (query.float() @ key.float().mT)[:, :, 0] * module.scaling
    sinks = local_part(module.sinks).float()[None, :, None].expand(len(scores), -1, 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., -1].mean()
