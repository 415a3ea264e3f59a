"""Modules compute with what this rank holds of their parameters, and the gradients come back to the DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from .collectives import add_once, all_reduce_gradient, mean_gradient
from .parts import in_parts, whole_tensor

Result = TypeVar("Result")


def dtensor_of(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size, stride: tuple[int, ...]
) -> DTensor:
    """Make the DTensor of which this rank holds `local`. Nothing is sent."""
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


class _Local(torch.autograd.Function):
    """What this rank holds of a DTensor.

    Unlike `to_local` it hands back contiguous gradients. Autograd would copy others into a new DTensor, for which torch
    divides the dimension into equal parts, and ours are uneven.
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.like = parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride()
        # What torch.compile traces knows no splits.
        ctx.splits = None if torch.compiler.is_compiling() else getattr(parameter, "splits", None)
        local = parameter.to_local()
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = dtensor_of(grads[0].contiguous(), *ctx.like)
        return whole if ctx.splits is None else in_parts(whole, ctx.splits)


@dataclass(frozen=True)
class Rule:
    """What becomes of a parameter on its way into a computation.

    Attributes:
        mean: axes over whose ranks its gradient is summed, as of parts of one batch.
        num_ranks: what its gradient is divided by.
        partial: axes over whose ranks its gradient is summed, as each computes a part with it.
        here: whether it is added on this rank, where results are summed up.
    """

    mean: tuple[DeviceMesh, ...] = ()
    num_ranks: int = 1
    partial: tuple[DeviceMesh, ...] = ()
    here: bool = True

    def __call__(self, local: Tensor) -> Tensor:
        if local.requires_grad:
            if self.num_ranks > 1:
                local = mean_gradient(local, [mesh.get_group() for mesh in self.mean], self.num_ranks)
            for mesh in self.partial:
                local = all_reduce_gradient(local, mesh.get_group())
        return local if self.here else add_once(local, here=False)


def with_local_parameters(
    rules: Mapping[str, Rule], module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The forward of a module in which its parameters are what this rank holds of them."""
    parameters: Mapping[str, Tensor | None] = module._parameters
    local = {name: _local(p) for name, p in parameters.items() if isinstance(p, DTensor)}
    if len(local) < len(parameters):
        _refuse(name for name, p in parameters.items() if p is not None and name not in local)
    for name in local:  # in one order on all ranks, as gradients meet in the reverse of it
        if name in rules:
            local[name] = rules[name](local[name])
    with attributes(module, local):
        return inner(*args, **kwargs)


def with_whole_parameters(module: nn.Module, function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function find whole parameters in a module and those inside it, which are plain then.

    They are gathered now, by all ranks together, and held as long as what this returns, which needs no other rank.
    """
    held: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for one in module.modules():
        parameters: Mapping[str, Tensor | None] = one._parameters
        held.append((one, {name: whole_tensor(p) for name, p in parameters.items() if isinstance(p, DTensor)}))

    def computed(*args: Any, **kwargs: Any) -> Result:
        with ExitStack() as meanwhile:
            for one, whole in held:
                meanwhile.enter_context(attributes(one, whole))
            return function(*args, **kwargs)

    return computed


_LOOKED_AT: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()
"""The children that modules had when they were last looked at."""


def refuse_foreign(module: nn.Module) -> None:
    """Raise `ValueError` if something was put into a module of which each rank computes a part.

    It would see that part alone, and so would its gradients.
    """
    if torch.compiler.is_compiling():
        return
    children = tuple(map(id, module._modules.values()))
    if _LOOKED_AT.get(module, ()) == children:
        return
    if "parametrizations" in module._modules:
        _refuse(getattr(module, "parametrizations"))  # noqa: B009
    _refuse(name for name, p in module.named_parameters() if not isinstance(p, DTensor))
    _LOOKED_AT[module] = children


def _refuse(foreign: Iterable[str]) -> None:
    if names := list(foreign):
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ValueError(
            f"{names[0]}{more} was put into a module that is spread over ranks, or moved there, and would be trained "
            "wrong. Take it out again (peft: unload()). shard_experts alone leaves attention whole, to be adapted."
        )


def _local(parameter: DTensor) -> Tensor:
    if parameter.requires_grad and torch.is_grad_enabled():
        local: Tensor = _Local.apply(parameter)  # type: ignore[no-untyped-call]
        return local
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
