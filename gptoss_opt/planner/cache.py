"""The bytes of keys and values, by type of layer, in closed form."""

from __future__ import annotations

from collections import Counter
from typing import Any

SLIDING = "sliding_attention"


def cache_bytes(config: Any, *, context: int, batch: int = 1, itemsize: int = 2, share: float = 1.0) -> dict[str, int]:
    """What transformers' `DynamicCache` holds after `context` tokens of each of `batch` sequences.

    A full layer keeps all of them, and a sliding one those that the next token sees beside itself: a window less one.

    Args:
        config: of a GPT-OSS model.
        context: tokens of a sequence.
        batch: how many sequences there are.
        itemsize: the bytes of a value: 2 in bfloat16.
        share: the part of the key heads that a rank holds.

    Returns:
        Bytes by type of layer, as the config calls it.

    Example:
        >>> from transformers import GptOssConfig
        >>> cache_bytes(GptOssConfig(), context=4096)
        {'sliding_attention': 4681728, 'full_attention': 150994944}
    """
    per_token = round(2 * config.num_key_value_heads * share) * config.head_dim * itemsize * batch
    found: Counter[str] = Counter()
    for kind in config.layer_types:
        found[kind] += per_token * (min(context, config.sliding_window - 1) if kind == SLIDING else context)
    return dict(found)
