"""The vocabulary over ranks: each has some rows of the embedding, and computes some of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core import Journal
from ..distributed import ModelMesh, Region, all_gather_last, attributes
from ..layout import Axis, Layout
from ..model.loss import VOCABULARY, LossAndLogits
from ..model.modules import vocabulary_modules
from .tensor import spread


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that each rank has, by its place along the region's axis."""

    region: Region
    parts: tuple[range, ...]

    @property
    def mine(self) -> range:
        """The token ids of this rank."""
        return self.parts[self.region.rank]

    @property
    def size(self) -> int:
        """The size of the whole vocabulary."""
        return self.parts[-1].stop

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what each rank has found in its part."""
        return self.region.sum(x)

    def max(self, x: Tensor) -> Tensor:
        """The largest of what each rank has found in its part, element by element."""
        return self.region.max(x)


def vocabulary_layout(model: nn.Module, layout: Layout, axis: Axis) -> Layout:
    """`layout` with embedding and head spread over an axis."""
    modules = {name: module for _, module, name in vocabulary_modules(model)}  # one, if they are tied
    for name, module in modules.items():
        size = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
        layout = spread(layout, [name], 0, size, axis)
    return layout


def attach_vocabulary(model: nn.Module, layout: Layout, mesh: ModelMesh, axis: str, journal: Journal) -> Iterator[str]:
    """Let the ranks along an axis meet around embedding and head, if the layout asks for it; say how, in sentences."""
    hidden = cast(Any, model).config.hidden_size
    for path, module, name in vocabulary_modules(model):
        split = next((one for one in layout.form(name).splits if one.axis == axis), None)
        if split is None:
            continue
        parts = tuple(part for part in split.parts if isinstance(part, range))
        function = embedding_of_part if isinstance(module, nn.Embedding) else logits_of_parts
        vocabulary = Vocabulary(Region(mesh, axis), parts)
        journal.around(model, path, function, vocabulary)
        if function is embedding_of_part:
            yield f"1 all-reduce of [tokens, {hidden}], after the embedding"
        else:
            journal.set(model, path, VOCABULARY, vocabulary)
            yield f"1 all-gather of [tokens, {split.size}], the logits"


def embedding_of_part(data: Vocabulary, module: Any, inner: Callable[..., Tensor], input: Tensor) -> Tensor:
    """The embedding of which each rank has some rows."""
    mine, padding = data.mine, module.padding_idx
    if input.is_cpu and not torch.compiler.is_compiling() and bool(((input < 0) | (input >= data.size)).any()):
        raise IndexError(f"a token id is outside the vocabulary of {data.size}.")
    here = (input >= mine.start) & (input < mine.stop)
    local = torch.where(here, input - mine.start, 0)
    inside = padding - mine.start if padding is not None and padding in mine else None
    with attributes(module, {"padding_idx": inside}):
        rows = inner(local)
    return data.region.reduce_from_region(rows.masked_fill(~here[..., None], 0))


def logits_of_parts(data: Vocabulary, module: nn.Module, inner: Callable[..., Any], input: Tensor) -> Any:
    """The logits of which each rank computes some. A head that is asked for a loss gives that, and logits or None."""
    found = inner(data.region.copy_to_region(input))
    logits = found.logits if isinstance(found, LossAndLogits) else found
    if logits is not None:
        logits = all_gather_last(logits, [len(part) for part in data.parts], data.region.group)
    return found._replace(logits=logits) if isinstance(found, LossAndLogits) else logits
