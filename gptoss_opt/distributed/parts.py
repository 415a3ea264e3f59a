"""DTensors in parts that torch would not cut: uneven ones, by whole blocks, and experts wherever they are placed.

torch takes the parts of a sharded dimension for equal ones (but for the last), and has no other way to say it. These
tensors tell it themselves, to torch.distributed.checkpoint by its own protocol, so that it writes and reads what is
there, into any number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ..kernels.codes import refuse_arithmetic
from ..layout import Part, Split
from . import collectives

TOGETHER = (
    "parameters that are spread over ranks cannot be put together with others, as DistributedDataParallel does (and "
    "with it accelerate, Lightning and Ray): the model sums and averages its gradients itself. Train the model as it "
    "is, without that around it."
)
"""Said to whatever gathers parameters in buckets."""


class PartTensor(DTensor):
    """A DTensor whose parts are those of its splits. What is computed of it elementwise is one too.

    Attributes:
        splits: which indices each rank holds, dimension by dimension; None while it is traced.
    """

    splits: tuple[Split, ...] | None

    def __new__(cls, local: Tensor, spec: Any = None, *, requires_grad: bool = False) -> PartTensor:
        """Refuse to be made of a tensor alone, as by those who want to move a parameter elsewhere."""
        if spec is None:
            raise ValueError(
                "a parameter that is spread over ranks cannot be made anew or moved, as accelerate's offloading and "
                "quantisers do. Shard over more ranks instead, or do that to a model that is not sharded."
            )
        return cast(PartTensor, cast(Any, DTensor).__new__(cls, local, spec, requires_grad=requires_grad))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Parameters of bytes are codes.
        if any(isinstance(x, PartTensor) and x.dtype == torch.uint8 for x in pytree.tree_leaves(args)):
            refuse_arithmetic(func.overloadpacket.__name__)
        # As of buckets: torch would take the parts for equal ones, and average what is no replica.
        if func is torch.ops.aten.cat.default:
            raise ValueError(TOGETHER)
        result = DTensor.__torch_dispatch__(func, types, args, kwargs or {})
        # Of lists, such as an optimizer's, each result is of the tensors at its place.
        if type(result) in (list, tuple):
            lists = [arg for arg in args if isinstance(arg, list | tuple) and len(arg) == len(result)]
            return type(result)(_like([one[n] for one in lists] or args, out) for n, out in enumerate(result))
        return _like(pytree.tree_leaves((args, kwargs)), result)

    def requires_grad_(self, requires_grad: bool = True) -> PartTensor:
        """As of any tensor, but that codes stay frozen: `model.requires_grad_(True)` is about all else."""
        if self.is_floating_point():
            super().requires_grad_(requires_grad)
        return self

    @staticmethod
    def __tensor_unflatten__(inner_tensors: Any, flatten_spec: Any, outer_size: Any, outer_stride: Any) -> DTensor:
        # What torch.compile traces knows no splits: it is of this class, and its graph gives it to nobody.
        return in_parts(DTensor.__tensor_unflatten__(inner_tensors, flatten_spec, outer_size, outer_stride), None)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole tensor, gathered from the ranks; all of them must ask for it."""
        return gather_whole(self.to_local(grad_placements=grad_placements).detach(), self._known(), self.device_mesh)

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

    def _known(self) -> tuple[Split, ...]:
        assert self.splits is not None, "a tensor that torch.compile traced has left its graph"
        return self.splits

    def _chunks(self) -> Iterator[tuple[list[int], list[int], tuple[slice, ...]]]:
        """The boxes that this rank holds: where each begins in the whole tensor, its size, and its place here."""
        mine: list[Part] = [range(size) for size in self.shape]
        for split in self._known():
            mine[split.dim] = split.parts[self.device_mesh.get_local_rank(split.axis)]
        for box in itertools.product(*map(_runs, mine)):
            offsets, sizes = [begin for begin, _, _ in box], [size for _, size, _ in box]
            yield offsets, sizes, tuple(slice(at, at + size) for _, size, at in box)


# As those of DTensors are: torch.load(weights_only=True) reads what a rank has saved.
torch.serialization.add_safe_globals([PartTensor, Split, range])


def _runs(part: Part) -> list[tuple[int, int, int]]:
    """The runs of neighbouring indices of a part: where each begins, how long it is, and where it lies in the part."""
    indices = list(part)
    starts = [n for n, index in enumerate(indices) if not n or index != indices[n - 1] + 1]
    return [(indices[a], b - a, a) for a, b in zip(starts, [*starts[1:], len(indices)], strict=True)]


def in_parts(tensor: DTensor, splits: Sequence[Split] | None) -> DTensor:
    """Let a DTensor say which parts it has."""
    tensor.__class__ = PartTensor
    tensor.splits = None if splits is None else tuple(splits)  # type: ignore[attr-defined]
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
        lambda x: x._local_tensor.shape,
    ]
    return all(fact(one) == fact(other) for fact in facts)


def gather_whole(local: Tensor, splits: Sequence[Split], mesh: DeviceMesh) -> Tensor:
    """The whole tensor of which this rank holds `local`, on all ranks; all of them must ask for it."""
    for split in splits:
        group, rank = mesh.get_group(split.axis), mesh.get_local_rank(split.axis)
        parts = collectives.all_gather_parts(local, shapes_of(local, split), rank, group)
        local = put_together(parts, split)
    return local


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


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without gradient, on all ranks that hold parts of it; all of them must ask for it.

    What several ranks hold alike is what the first of them has, so that they get the same where they differ.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    alike = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    if alike:
        whole = whole.clone()  # not into what this rank holds
    for dim in alike:
        collectives.broadcast(whole, tensor.device_mesh.get_group(dim))
    return whole


def sum_of_parts(value: Tensor, of: Tensor) -> Tensor:
    """The sum over all ranks that hold a part of a tensor of what each has computed from its own."""
    if isinstance(of, DTensor):
        for dim, placement in enumerate(of.placements):
            if not placement.is_replicate():  # a shard, or FSDP's own kind of one
                value = collectives.summed(value, of.device_mesh.get_group(dim))
    return value
