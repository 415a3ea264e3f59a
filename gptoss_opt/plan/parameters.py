"""What a rank holds of a model's parameters, by kind: from the layout, in closed form."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..core import Stack
from ..layout import DENSE, Form

KINDS = {
    ".experts.": "experts",
    ".self_attn.": "attention",
    "embed_tokens.": "embedding and head",
    "lm_head.": "embedding and head",
}
"""Kinds of parameters, by what their names contain."""
OTHERS, ADAPTERS = "router and norms", "adapters"


@dataclass(frozen=True)
class Parameters:
    """The parameters of the rank that holds the most bytes of them.

    Attributes:
        weights: bytes by kind: "experts", "attention", "embedding and head", "router and norms", "adapters".
        trainable: how many values of adapters there are, by the bytes of a value.
        dense: how many values there are that are neither packed nor of adapters, by the bytes of a value.
    """

    weights: Mapping[str, int]
    trainable: Mapping[int, int]
    dense: Mapping[int, int]

    @property
    def num_bytes(self) -> int:
        """All weights, in bytes."""
        return sum(self.weights.values())


def parameters_of(model: nn.Module, stack: Stack) -> Parameters:
    """What the fullest rank holds of `model`, which may be on the meta device, in the layout of a stack.

    Raises:
        LayoutError: the stack cannot be laid out on this model.

    Example:
        >>> from gptoss_opt import compose, with_mxfp4_experts
        >>> parameters_of(model, compose()).num_bytes > parameters_of(model, compose(with_mxfp4_experts())).num_bytes
        True
    """
    layout = stack.layout(model)
    forms = {name: layout.form(name) for name in layout}
    names = [axis.name for axis in layout.axes]
    places = itertools.product(*(range(axis.degree) for axis in layout.axes))
    ranks = (_on_rank(forms, dict(zip(names, place, strict=True))) for place in places)
    return max(ranks, key=lambda found: found.num_bytes)


def kind_of(name: str, form: Form) -> str:
    """The kind of a parameter.

    Example:
        >>> kind_of("model.layers.0.mlp.experts.gate_up_proj", Form())
        'experts'
    """
    return ADAPTERS if form.new else next((kind for part, kind in KINDS.items() if part in name), OTHERS)


def _on_rank(forms: Mapping[str, Form], coordinate: Mapping[str, int]) -> Parameters:
    weights: Counter[str] = Counter()
    trainable: Counter[int] = Counter()
    dense: Counter[int] = Counter()
    for name, form in forms.items():
        num_bytes = form.num_bytes(coordinate)
        weights[kind_of(name, form)] += num_bytes
        if form.new and form.new.trainable:
            trainable[form.dtype.itemsize] += num_bytes // form.dtype.itemsize
        elif form.storage == DENSE.name and not form.new:
            dense[form.dtype.itemsize] += num_bytes // form.dtype.itemsize
    return Parameters(dict(weights), dict(trainable), dict(dense))
