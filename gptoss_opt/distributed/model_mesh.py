"""The ranks that hold one model together: its parameters are DTensors over them, and modules compute with their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..core import Journal, Layout, Split
from .collectives import add_once, all_reduce_gradient, all_reduce_output, mean_gradient
from .mesh import join, root_of


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
        """These ranks and those along `axis`.

        Raises `ValueError` if they are no axes of one mesh, or would both share their tokens and have their own.
        """
        mine = frozenset(self.names_of(axis))
        if mine & frozenset(self.names_of(self.mesh)) and own_tokens != bool(mine & self.own_tokens):
            raise ValueError(
                f"the ranks along {', '.join(mine)} have tokens of their own by one wrapper (dispatch='all_to_all'), "
                "and share them by the other. Use dispatch='all_reduce', or give each wrapper its own axis of a mesh."
            )
        return ModelMesh(join(self.mesh, axis), self.own_tokens | (mine if own_tokens else frozenset()))

    @staticmethod
    def names_of(mesh: DeviceMesh) -> tuple[str, ...]:
        """The names of the axes of a mesh."""
        return tuple(cast(Any, mesh).mesh_dim_names)

    @property
    def coordinate(self) -> dict[str, int]:
        """Where this rank is, by axis."""
        return {name: self.mesh.get_local_rank(name) for name in self.names_of(self.mesh)}

    @property
    def data_axes(self) -> dict[str, DeviceMesh]:
        """The axes along which ranks have tokens of their own, so that gradients are averaged over them."""
        root = root_of(self.mesh)
        names = [n for n in self.names_of(root) if n in self.own_tokens or (n.startswith("dp") and n not in self)]
        return {name: root[name] if root.ndim > 1 else root for name in names}

    def __contains__(self, axis: str) -> bool:
        return axis in self.names_of(self.mesh)

    def group(self, axis: str) -> ProcessGroup:
        """The ranks along an axis that this one belongs to."""
        return self.mesh.get_group(axis)

    def parameter(self, local: Tensor, splits: Sequence[Split], requires_grad: bool) -> nn.Parameter:
        """A DTensor of which this rank holds `local`. Parts may be uneven."""
        dims = {split.axis: split for split in splits}
        placements: list[Placement] = [
            Shard(dims[name].dim) if name in dims else Replicate() for name in self.names_of(self.mesh)
        ]
        shape = list(local.shape)
        for split in splits:
            shape[split.dim] = split.size
        stride = torch.empty(shape, device="meta").stride()
        whole = _of_local(local.contiguous(), self.mesh, placements, torch.Size(shape), stride)
        return nn.Parameter(whole, requires_grad=requires_grad)

    def holds(self, parameter: Tensor) -> bool:
        """Whether it is a DTensor over these ranks."""
        return isinstance(parameter, DTensor) and parameter.device_mesh == self.mesh

    def local(self, parameter: Tensor) -> Tensor:
        """What this rank holds of it, without gradient."""
        return cast(DTensor, parameter.detach()).to_local()

    def whole(self, local: Tensor, splits: Sequence[Split]) -> Tensor:
        """The whole tensor, gathered from the ranks; all of them must ask for it."""
        for split in splits:
            group, parts = self.group(split.axis), []
            for rank, part in enumerate(split.parts):
                mine = self.coordinate[split.axis] == rank
                shape = [len(part) if dim == split.dim else size for dim, size in enumerate(local.shape)]
                parts.append(local.contiguous() if mine else local.new_empty(shape))
                distributed.broadcast(parts[-1], group=group, group_src=rank)
            local = put_together(parts, split)
        return local

    def gather(self, local: Tensor, splits: Sequence[Split]) -> Tensor | None:
        """The whole tensor on the first of the ranks, None on the others; all of them must ask for it."""
        axes = [split.axis for split in splits]
        if any(place for axis, place in self.coordinate.items() if axis not in axes):
            return None
        for split in splits:
            group, rank = self.group(split.axis), self.coordinate[split.axis]
            if rank:
                distributed.send(local.contiguous(), group=group, group_dst=0)
                return None
            parts = [local]
            for other, part in enumerate(split.parts[1:], 1):
                shape = [len(part) if dim == split.dim else size for dim, size in enumerate(local.shape)]
                parts.append(local.new_empty(shape))
                distributed.recv(parts[-1], group=group, group_src=other)
            local = put_together(parts, split)
        return local

    def describe(self, model: nn.Module) -> str:
        """What this rank holds of a model, as a sentence."""
        parameters = list(model.parameters())
        mine = sum((self.local(p) if self.holds(p) else p).nbytes for p in parameters)
        whole = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        place = ", ".join(f"{axis}={number}" for axis, number in self.coordinate.items())
        return f"rank {distributed.get_rank()} ({place}) holds {mine / 1e6:,.2f} of {whole / 1e6:,.2f} MB"

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
        """Whether the ranks of this one's model are the first of those that hold it."""
        root = root_of(self.mesh)
        place = zip(self.names_of(root), root.get_coordinate() or (), strict=True)
        return not any(number for axis, number in place if axis not in self)

    def broadcast_from_first(self, value: Any) -> Any:
        """What the first rank of all gives; all of them must ask for it."""
        root, values = root_of(self.mesh), [value]
        for axis in self.names_of(root):
            distributed.broadcast_object_list(values, group=root.get_group(axis), group_src=0)
        return values[0]

    @property
    def sharing(self) -> int:
        """How many ranks have the same tokens."""
        return torch.Size(self.mesh.size(self.names_of(self.mesh).index(name)) for name in self._sharing_axes).numel()

    @property
    def replicas(self) -> int:
        """How many have tokens of their own."""
        return torch.Size(mesh.size() for mesh in self.data_axes.values()).numel()

    @property
    def _sharing_axes(self) -> list[str]:
        return [name for name in self.names_of(self.mesh) if name not in self.own_tokens]

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
                distributed.broadcast(shared, group=self.group(name), group_src=0)
            restore(shared.cpu())

    def lay_out(self, model: nn.Module, layout: Layout, journal: Journal) -> None:
        """Let every module that has parameters compute with what this rank holds of them."""
        data_axes = self.data_axes
        for path, module in model.named_modules():
            if module._parameters:
                journal.around(model, path, with_local_parameters, self._rules(path, module, layout, data_axes))

    def _rules(
        self, path: str, module: nn.Module, layout: Layout, data_axes: Mapping[str, DeviceMesh]
    ) -> dict[str, Rule]:
        rules = {}
        for name in module._parameters:
            form = layout.form(f"{path}.{name}" if path else name)
            split = {split.axis for split in form.splits}
            mean = tuple(mesh for axis, mesh in data_axes.items() if axis not in split)
            here = all(self.coordinate[axis] == 0 for axis in form.added)
            rule = Rule(mean, self.replicas, here)
            if rule != Rule():
                rules[name] = rule
        return rules


@dataclass(frozen=True)
class Sum:
    """Where the ranks along an axis each compute a part of a result, which is the sum of the parts."""

    mesh: ModelMesh
    axis: str

    @property
    def rank(self) -> int:
        """This one, along the axis."""
        return self.mesh.coordinate[self.axis]

    @property
    def group(self) -> ProcessGroup:
        """The ranks along the axis."""
        return self.mesh.group(self.axis)

    def into(self, x: Tensor) -> Tensor:
        """`x`, the same on all ranks, as the input of what each computes a part of."""
        return all_reduce_gradient(x, self.group)

    def out(self, x: Tensor) -> Tensor:
        """The sum of the parts."""
        return all_reduce_output(x, self.group)


def _of_local(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size, stride: tuple[int, ...]
) -> DTensor:
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


class _Local(torch.autograd.Function):
    """What this rank holds of a DTensor.

    Unlike `to_local` it hands back contiguous gradients. Autograd would copy others into a new DTensor, for which torch
    divides the dimension into equal parts, and ours are uneven.
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.like = parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride()
        local = parameter.to_local()
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _of_local(grads[0].contiguous(), *ctx.like)


def put_together(parts: Sequence[Tensor], split: Split) -> Tensor:
    """The tensor that `parts` are slices of."""
    whole = torch.cat(tuple(parts), split.dim)
    order = [number for part in split.parts for number in part]
    if order == list(range(len(order))):
        return whole
    return whole.index_select(split.dim, torch.tensor(order, device=whole.device).argsort())


@dataclass(frozen=True)
class Rule:
    """What becomes of a parameter on its way into a computation.

    Attributes:
        mean: axes over whose ranks its gradient is summed.
        num_ranks: what its gradient is divided by.
        here: whether it is added on this rank, where results are summed up.
    """

    mean: tuple[DeviceMesh, ...] = ()
    num_ranks: int = 1
    here: bool = True

    def __call__(self, local: Tensor) -> Tensor:
        if local.requires_grad and self.num_ranks > 1:
            local = mean_gradient(local, [mesh.get_group() for mesh in self.mean], self.num_ranks)
        return local if self.here else add_once(local, here=False)


def with_local_parameters(
    rules: Mapping[str, Rule], module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The forward of a module in which its parameters are what this rank holds of them."""
    parameters: Mapping[str, Tensor | None] = module._parameters
    local = {name: _local(p) for name, p in parameters.items() if isinstance(p, DTensor)}
    for name in local:  # in one order on all ranks, as gradients meet in the reverse of it
        if name in rules:
            local[name] = rules[name](local[name])
    with attributes(module, local):
        return inner(*args, **kwargs)


def _local(parameter: DTensor) -> Tensor:
    if parameter.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Local.apply(parameter))
    return parameter.to_local()


@contextmanager
def attributes(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Meanwhile, a module has other attributes; they may hide its parameters."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            del module.__dict__[name]
        module.__dict__.update(before)
