"""The numbers of a config.json, checked before a model is built of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What a number must be: of this kind, from `low` up to `high`."""

    kind: type
    low: float
    high: float = math.inf

    def __str__(self) -> str:
        words = "a whole number" if self.kind is Integral else "a number"
        return f"{words} of at least {self.low:g}" + (f", at most {self.high:g}" if self.high < math.inf else "")

    def holds(self, value: object) -> bool:
        """Whether a value is such a number."""
        number = isinstance(value, self.kind) and not isinstance(value, bool)
        return number and self.low <= float(value) <= self.high and math.isfinite(float(value))  # type: ignore[arg-type]


COUNT, TINY = Range(Integral, 1, 2**31 - 1), 1e-30

CONFIG: Mapping[str, Range] = {
    **dict.fromkeys(("num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size"), COUNT),
    **dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), COUNT),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), COUNT),
    "head_dim": Range(Integral, 2, 2**31 - 1),
    "rms_norm_eps": Range(Real, 0),
    "initializer_range": Range(Real, 0),
    "attention_dropout": Range(Real, 0, 1),
    "swiglu_limit": Range(Real, TINY),
}
ROPE: Mapping[str, Range] = {
    "rope_theta": Range(Real, 1 + 1e-6),
    **dict.fromkeys(
        ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"), Range(Real, TINY)
    ),
    "original_max_position_embeddings": COUNT,
}
LAYER_TYPES = ("sliding_attention", "full_attention")


def wrong_numbers(config: Any, rope_types: Sequence[str]) -> Iterator[tuple[str, object, str]]:
    """The keys of a config whose values cannot be, each with its value and what it must be."""
    rope = getattr(config, "rope_parameters", None) or {}
    for ranges, values in ((CONFIG, vars(config)), (ROPE, rope)):
        for key, wanted in ranges.items():
            value = values.get(key)
            if (value is not None or (ranges is CONFIG and key in values)) and not wanted.holds(value):
                yield key, value, str(wanted)
                return
    if rope and (kind := rope.get("rope_type", "default")) not in rope_types:
        yield "rope_type", kind, f"one of {', '.join(rope_types)}"
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    ids = Range(Integral, -config.vocab_size, config.vocab_size - 1)
    for key, value, wanted in (
        ("num_experts_per_tok", config.num_experts_per_tok, Range(Integral, 1, config.num_local_experts)),
        ("sliding_window", config.sliding_window, COUNT),
        ("pad_token_id", config.pad_token_id, ids),
    ):
        if value is not None and not wanted.holds(value):
            yield key, value, str(wanted)
    if heads % config.num_key_value_heads:
        yield "num_key_value_heads", config.num_key_value_heads, f"a divisor of num_attention_heads, {heads}"
    if config.head_dim % 2:
        yield "head_dim", config.head_dim, "even"
    if len(config.layer_types) != layers or set(config.layer_types) - {*LAYER_TYPES}:
        yield "layer_types", config.layer_types, f"{layers} times one of {', '.join(LAYER_TYPES)}"
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        yield "sliding_window", None, str(COUNT)
