"""The backends that compute attention and experts: the one that a config names, and the others that serve here."""

from __future__ import annotations

from typing import Any

from ..kernels.attention import BACKENDS as ATTENTION_BACKENDS
from ..kernels.experts import DENSE_BACKENDS, PACKED_BACKENDS, PackedWeights
from ..model.attention import KEY, attention_request
from ..model.experts import experts_request, weights_held
from ..model.implementations import IMPLEMENTATION, implementation_of
from .ranks import VerifyingRanks


def other_backends(model: Any, ranks: VerifyingRanks) -> dict[str, list[str]]:
    """The other backends of attention and of experts that serve on all ranks, in the same order on all of them."""
    found: dict[str, list[str]] = {}
    mine = {part: [implementation_of(model.config, part), _serving(model, part)] for part in IMPLEMENTATION}
    said = ranks.exchange(mine)
    for part in IMPLEMENTATION:
        chosen, serving = zip(*(each[part] for each in said), strict=True)
        found[part] = [
            name for name in serving[0] if all(name in here for here in serving) and any(name != one for one in chosen)
        ]
    return found


def _serving(model: Any, part: str) -> list[str]:
    """The backends of a part that serve here, where one of ours computes it at all."""
    if not str(getattr(model.config, IMPLEMENTATION[part])).startswith(KEY.format("")):
        return []
    if part == "attention":
        wanted = attention_request(model)
        return [one.name for one in ATTENTION_BACKENDS if one.why_not(wanted) is None]
    asked = experts_request(model)
    packed = isinstance(weights_held(model.model.layers[0].mlp.experts, "down_proj"), PackedWeights)
    return [one.name for one in (PACKED_BACKENDS if packed else DENSE_BACKENDS) if one.why_not(asked) is None]
