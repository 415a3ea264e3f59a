"""What a rank holds of a model's parameters, by kind: from the layout, in closed form."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from ..core import Stack
from ..layout import DENSE, Axis, Form

KINDS = {
    ".experts.": "experts",
    ".self_attn.": "attention",
    "embed_tokens.": "embedding and head",
    "lm_head.": "embedding and head",
}
"""Kinds of parameters, by what their names contain."""
PARTS = (
    ("k_proj.weight", 0),
    ("experts.gate_up_proj", 0),
    ("experts.gate_up_proj", 2),
    ("lm_head.weight", 0),
)
"""Where it is seen which part a rank has of heads, experts, inner features and words: a name's end, a dimension."""
LAYERS = ".layers."
"""What the name of every parameter of a layer contains, after a dot."""
OTHERS, ADAPTERS = "router and norms", "adapters"


@dataclass(frozen=True)
class Parameters:
    """The parameters of the rank that holds the most bytes of them.

    Attributes:
        weights: bytes by kind: "experts", "attention", "embedding and head", "router and norms", "adapters".
        trainable: how many values of adapters there are, by the bytes of a value.
        dense: how many values there are that are neither packed nor of adapters, by the bytes of a value.
        heads, experts, inner, words: which part it has of the key heads, of the experts, of each expert's inner
            features, and of the vocabulary: 1.0 where it has all.
        axes: how many ranks hold the model together, by the axis they are along.
    """

    weights: Mapping[str, int]
    trainable: Mapping[int, int]
    dense: Mapping[int, int]
    heads: float = 1.0
    experts: float = 1.0
    inner: float = 1.0
    words: float = 1.0
    axes: Mapping[str, int] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many ranks hold the model together."""
        return math.prod(self.axes.values())

    @property
    def itemsize(self) -> int:
        """The bytes of most values that are not packed, and so of activations."""
        return max(self.dense, key=lambda size: self.dense[size], default=2)

    @property
    def num_bytes(self) -> int:
        """All weights, in bytes."""
        return sum(self.weights.values())


def parameters_of(model: nn.Module, stack: Stack, *, repeats: int = 1) -> Parameters:
    """What the fullest rank holds of `model`, which may be on the meta device, in the layout of a stack.

    Args:
        model: of which shapes and dtypes are read.
        stack: the wrappers that would be on it.
        repeats: how many layers each layer of `model` stands for. Layers of a config are alike, so that a model of one
            of them tells what any number of them takes.

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
    places = [dict(zip(names, place, strict=True)) for place in itertools.product(*map(_numbers, layout.axes))]
    # Ranks whose parts are as large hold as much: one of them stands for all.
    splits = {form.splits for form in forms.values()}
    unlike = {tuple(len(part.parts[at[part.axis]]) for each in splits for part in each): at for at in places}
    ranks = [_on_rank(forms, at, repeats) for at in unlike.values()]
    axes = {axis.name: axis.degree for axis in layout.axes}
    return replace(max(ranks, key=lambda found: found.num_bytes), axes=axes)


def _numbers(axis: Axis) -> range:
    return range(axis.degree)


def kind_of(name: str, form: Form) -> str:
    """The kind of a parameter.

    Example:
        >>> kind_of("model.layers.0.mlp.experts.gate_up_proj", Form())
        'experts'
    """
    return ADAPTERS if form.new else next((kind for part, kind in KINDS.items() if part in name), OTHERS)


def _on_rank(forms: Mapping[str, Form], coordinate: Mapping[str, int], repeats: int) -> Parameters:
    weights: Counter[str] = Counter()
    trainable: Counter[int] = Counter()
    dense: Counter[int] = Counter()
    for name, form in forms.items():
        num_bytes = form.num_bytes(coordinate) * (repeats if LAYERS in f".{name}" else 1)
        weights[kind_of(name, form)] += num_bytes
        if form.new and form.new.trainable:
            trainable[form.dtype.itemsize] += num_bytes // form.dtype.itemsize
        elif form.storage == DENSE.name and not form.new:
            dense[form.dtype.itemsize] += num_bytes // form.dtype.itemsize
    heads, experts, inner, words = (_part(forms, coordinate, *where) for where in PARTS)
    return Parameters(dict(weights), dict(trainable), dict(dense), heads, experts, inner, words)


def _part(forms: Mapping[str, Form], coordinate: Mapping[str, int], ending: str, dim: int) -> float:
    """Which part of a dimension a rank has, of the first parameter whose name ends so."""
    form = next((form for name, form in forms.items() if name.endswith(ending)), None)
    if form is None:
        return 1.0
    return len(form.index(coordinate).get(dim, range(form.shape[dim]))) / form.shape[dim]
