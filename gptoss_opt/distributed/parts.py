"""DTensors in parts that torch would not cut: uneven ones, by whole blocks, and experts wherever they are placed.

torch takes the parts of a sharded dimension for equal ones (but for the last), and has no other way to say it. These
tensors tell it themselves, to torch.distributed.checkpoint by its own protocol, so that it writes and reads what is
there, into any number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ..layout import Part, Split
from . import collectives


class PartTensor(DTensor):
    """A DTensor whose parts are those of its splits. What is computed of it elementwise is one too.

    Attributes:
        splits: which indices each rank holds, dimension by dimension.
    """

    splits: tuple[Split, ...]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = DTensor.__torch_dispatch__(func, types, args, kwargs or {})
        # Of lists, such as an optimizer's, each result is of the tensors at its place.
        if type(result) in (list, tuple):
            lists = [arg for arg in args if isinstance(arg, list | tuple) and len(arg) == len(result)]
            return type(result)(_like([one[n] for one in lists] or args, out) for n, out in enumerate(result))
        return _like(pytree.tree_leaves((args, kwargs)), result)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole tensor, gathered from the ranks; all of them must ask for it."""
        local = self.to_local(grad_placements=grad_placements)
        for split in self.splits:
            group, rank = self.device_mesh.get_group(split.axis), self.device_mesh.get_local_rank(split.axis)
            parts = collectives.all_gather_parts(local.detach(), shapes_of(local, split), rank, group)
            local = put_together(parts, split)
        return local

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in self._chunks()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.to_local())
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        found = next(place for offsets, _, place in self._chunks() if torch.Size(offsets) == index.offset)
        return self.to_local()[found]

    def _chunks(self) -> Iterator[tuple[list[int], list[int], tuple[slice, ...]]]:
        """The boxes that this rank holds: where each begins in the whole tensor, its size, and its place here."""
        mine: list[Part] = [range(size) for size in self.shape]
        for split in self.splits:
            mine[split.dim] = split.parts[self.device_mesh.get_local_rank(split.axis)]
        for box in itertools.product(*map(_runs, mine)):
            offsets, sizes = [begin for begin, _, _ in box], [size for _, size, _ in box]
            yield offsets, sizes, tuple(slice(at, at + size) for _, size, at in box)


def _runs(part: Part) -> list[tuple[int, int, int]]:
    """The runs of neighbouring indices of a part: where each begins, how long it is, and where it lies in the part."""
    indices = list(part)
    starts = [n for n, index in enumerate(indices) if not n or index != indices[n - 1] + 1]
    return [(indices[a], b - a, a) for a, b in zip(starts, [*starts[1:], len(indices)], strict=True)]


def as_torch_cuts(split: Split) -> bool:
    """Whether the parts of a split are those that torch would cut."""
    size = -(-split.size // len(split.parts))
    bounds = [(min(n * size, split.size), min((n + 1) * size, split.size)) for n in range(len(split.parts))]
    return all(list(part) == list(range(*bound)) for part, bound in zip(split.parts, bounds, strict=True))


def in_parts(tensor: DTensor, splits: Sequence[Split]) -> DTensor:
    """Let a DTensor say which parts it has, where they are not those that torch would cut."""
    if not all(map(as_torch_cuts, splits)):
        tensor.__class__ = PartTensor
        tensor.splits = tuple(splits)  # type: ignore[attr-defined]
    return tensor


def _like(given: Sequence[Any], made: Any) -> Any:
    if type(made) is DTensor:
        for one in given:
            if isinstance(one, PartTensor) and _alike(one, made):
                return in_parts(made, one.splits)
    return made


def _alike(one: DTensor, other: DTensor) -> bool:
    facts: list[Callable[[DTensor], Any]] = [
        lambda x: x.shape,
        lambda x: x.placements,
        lambda x: x.device_mesh,
        lambda x: x.to_local().shape,
    ]
    return all(fact(one) == fact(other) for fact in facts)


def shapes_of(local: Tensor, split: Split) -> list[list[int]]:
    """The shapes of what the ranks along the axis of a split hold."""
    return [[len(part) if dim == split.dim else size for dim, size in enumerate(local.shape)] for part in split.parts]


def put_together(parts: Sequence[Tensor], split: Split) -> Tensor:
    """The tensor that `parts` are slices of."""
    whole = torch.cat(tuple(parts), split.dim)
    order = [number for part in split.parts for number in part]
    if order == list(range(len(order))):
        return whole
    return whole.index_select(split.dim, torch.tensor(order, device=whole.device).argsort())
