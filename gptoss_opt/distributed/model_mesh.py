"""The ranks that hold one model together: its parameters are DTensors over them, sharded or replicated."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..layout import LayoutError, Split
from . import collectives
from .local import dtensor_of
from .mesh import join, names_of, root_of
from .parts import gather_whole, in_parts, put_together, shapes_of


@dataclass(frozen=True)
class ModelMesh:
    """The ranks that hold one model together.

    Attributes:
        mesh: over which the parameters are DTensors, all of them: sharded, or replicated.
        own_tokens: the axes of `mesh` along which ranks have tokens of their own.
    """

    mesh: DeviceMesh
    own_tokens: frozenset[str] = frozenset()

    def joined(self, axis: DeviceMesh, *, own_tokens: bool = False) -> ModelMesh:
        """These ranks and those along `axis`. Raises `LayoutError` if they are no axes of one mesh."""
        try:
            mesh = join(self.mesh, axis)
        except ValueError as error:
            raise LayoutError(str(error)) from error
        return ModelMesh(mesh, self.own_tokens | frozenset(names_of(axis) if own_tokens else ()))

    @property
    def coordinate(self) -> dict[str, int]:
        """Where this rank is, by axis."""
        return {name: self.mesh.get_local_rank(name) for name in names_of(self.mesh)}

    @property
    def data_axes(self) -> dict[str, DeviceMesh]:
        """The axes along which ranks have tokens of their own, so that gradients are averaged over them."""
        root = root_of(self.mesh)
        names = [n for n in names_of(root) if n in self.own_tokens or (n.startswith("dp") and n not in self)]
        return {name: root[name] if root.ndim > 1 else root for name in names}

    def __contains__(self, axis: str) -> bool:
        return axis in names_of(self.mesh)

    def axis(self, name: str) -> DeviceMesh:
        """One axis of the mesh."""
        return self.mesh[name] if self.mesh.ndim > 1 else self.mesh

    def group(self, axis: str) -> ProcessGroup:
        """The ranks along an axis that this one belongs to."""
        return self.mesh.get_group(axis)

    def parameter(self, local: Tensor, splits: Sequence[Split], requires_grad: bool) -> nn.Parameter:
        """Make a DTensor of which this rank holds `local`. Parts may be uneven."""
        dims = {split.axis: split for split in splits}
        placements: list[Placement] = [
            Shard(dims[name].dim) if name in dims else Replicate() for name in names_of(self.mesh)
        ]
        shape = list(local.shape)
        for split in splits:
            shape[split.dim] = split.size
        stride = torch.empty(shape, device="meta").stride()
        whole = dtensor_of(local.contiguous(), self.mesh, placements, torch.Size(shape), stride)
        return nn.Parameter(in_parts(whole, splits), requires_grad=requires_grad)

    def holds(self, parameter: Tensor) -> bool:
        """Whether it is a DTensor over these ranks."""
        return isinstance(parameter, DTensor) and parameter.device_mesh == self.mesh

    def local(self, parameter: Tensor) -> Tensor:
        """What this rank holds of a parameter, without gradient."""
        return cast(DTensor, parameter.detach()).to_local()

    def outer_splits(self, parameter: DTensor, splits: Sequence[Split]) -> list[Split]:
        """How FSDP, over other axes, has cut what each of these ranks holds of a parameter by its `splits`.

        Raises `ValueError` if it is held in another way.
        """
        held, shape = parameter.device_mesh, list(parameter.shape)
        names = names_of(held) if held.mesh_dim_names else ()
        if not all(axis in names for axis in names_of(self.mesh)):
            raise ValueError(f"it is spread over {held}, not over the ranks that the wrappers put it on")
        for split in splits:
            shape[split.dim] = len(split.parts[self.coordinate[split.axis]])
        found = []
        for axis, count, placement in zip(names, held.shape, parameter.placements, strict=True):
            if axis not in self and not placement.is_replicate():
                dim = cast(Shard, placement).dim
                size = -(-shape[dim] // count)  # as torch.chunk does
                bounds = [min(number * size, shape[dim]) for number in range(count + 1)]
                found.append(Split(dim, axis, tuple(itertools.starmap(range, itertools.pairwise(bounds)))))
        return found

    def gather_outer(self, parameter: Tensor, splits: Sequence[Split]) -> Tensor:
        """What these ranks hold of a parameter that FSDP has cut over other axes; all ranks along those must ask."""
        dtensor = cast(DTensor, parameter.detach())
        return gather_whole(dtensor.to_local(), self.outer_splits(dtensor, splits), dtensor.device_mesh)

    def whole(self, local: Tensor, splits: Sequence[Split]) -> Tensor:
        """Gather the whole tensor from the ranks; all of them must ask for it."""
        return gather_whole(local, splits, self.mesh)

    def gather(self, local: Tensor, splits: Sequence[Split]) -> Tensor | None:
        """Gather the whole tensor on the first of the ranks, None on the others; all of them must ask for it."""
        axes = [split.axis for split in splits]
        if any(place for axis, place in self.coordinate.items() if axis not in axes):
            return None
        for split in splits:
            group, rank = self.group(split.axis), self.coordinate[split.axis]
            parts = collectives.gather_parts(local, shapes_of(local, split), rank, group)
            if parts is None:
                return None
            local = put_together(parts, split)
        return local

    def describe(self, model: nn.Module) -> str:
        """Say in a sentence what this rank holds of a model."""
        parameters = list(model.parameters())
        mine = sum((self.local(p) if self.holds(p) else p).nbytes for p in parameters)
        whole = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        place = ", ".join(f"{axis}={number}" for axis, number in self.coordinate.items())
        return f"rank {torch.distributed.get_rank()} ({place}) holds {mine / 1e6:,.2f} of {whole / 1e6:,.2f} MB"

    @property
    def device_type(self) -> str:
        """What the ranks compute on."""
        return self.mesh.device_type

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of all, replicas included."""
        return not any(root_of(self.mesh).get_coordinate() or ())

    @property
    def in_first_replica(self) -> bool:
        """Whether this rank's model is the first of those that are held side by side."""
        root = root_of(self.mesh)
        place = zip(names_of(root), root.get_coordinate() or (), strict=True)
        return not any(number for axis, number in place if axis not in self)

    def broadcast_from_first(self, value: Any) -> Any:
        """The value that the first rank of all gives; all of them must ask for it."""
        root = root_of(self.mesh)
        for dim in range(root.ndim):  # FSDP's own mesh has no names
            value = collectives.broadcast_object(value, root.get_group(dim))
        return value

    @property
    def tp_size(self) -> int:
        """How many ranks have the same tokens."""
        return torch.Size(self.mesh.size(names_of(self.mesh).index(name)) for name in self._sharing_axes).numel()

    @property
    def dp_size(self) -> int:
        """How many ranks, or groups of ranks with the same tokens, have tokens of their own."""
        return torch.Size(mesh.size() for mesh in self.data_axes.values()).numel()

    @property
    def own_size(self) -> int:
        """How many of the ranks that hold the model together have tokens of their own."""
        return self.mesh.size() // self.tp_size

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what each of these ranks has found, without gradient."""
        for name in names_of(self.mesh):
            x = collectives.summed(x, self.group(name))
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest of what each of these ranks has found, element by element, without gradient."""
        for name in names_of(self.mesh):
            x = collectives.largest(x, self.group(name))
        return x

    @property
    def dp_rank(self) -> int:
        """The number of this rank, or of its group of ranks with the same tokens, among those with their own."""
        number = 0
        for mesh in self.data_axes.values():
            number = number * mesh.size() + mesh.get_local_rank()
        return number

    @property
    def _sharing_axes(self) -> list[str]:
        return [name for name in names_of(self.mesh) if name not in self.own_tokens]

    def share_random_state(self, device: torch.device) -> None:
        """Give the ranks that have the same tokens the random state of the first of them."""
        states = [(torch.get_rng_state(), torch.set_rng_state)]
        if device.type == "cuda":
            states.append(
                (torch.cuda.get_rng_state(device), functools.partial(torch.cuda.set_rng_state, device=device))
            )
        for state, restore in states:
            shared = state.to(self.mesh.device_type)
            for name in self._sharing_axes:
                collectives.broadcast(shared, self.group(name))
            restore(shared.cpu())


@dataclass(frozen=True)
class Region:
    """Where the ranks along an axis each compute a part of a result, which is the sum of the parts."""

    mesh: ModelMesh
    axis: str

    @property
    def rank(self) -> int:
        """The place of this rank along the axis."""
        return self.mesh.coordinate[self.axis]

    @property
    def group(self) -> ProcessGroup:
        """The ranks along the axis."""
        return self.mesh.group(self.axis)

    def copy_to_region(self, x: Tensor) -> Tensor:
        """`x`, the same on all ranks, as the input of what each computes a part of: its gradients are summed."""
        return collectives.all_reduce_gradient(x, self.group)

    def reduce_from_region(self, x: Tensor) -> Tensor:
        """The sum of the parts."""
        return collectives.all_reduce_output(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what each rank has found, without gradient."""
        return collectives.summed(x, self.group)

    def max(self, x: Tensor) -> Tensor:
        """The largest of what each rank has found, element by element, without gradient."""
        return collectives.largest(x, self.group)
