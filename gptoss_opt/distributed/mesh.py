"""Starting torch.distributed, and the meshes of its ranks."""

from __future__ import annotations

import atexit
import functools
import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..layout import Axis

TIMEOUT = timedelta(minutes=3)
"""How long a rank waits for the others: short enough for a person to wait for it."""

LAUNCH = "torchrun --nproc-per-node 2 your_script.py"

NEIGHBOURS = "tp"
"""The axis of neighbouring processes, where a degree was given and no mesh."""

Shape = tuple[tuple[str, int], ...]
"""A mesh of all processes as data: the name of each axis and how many ranks are along it, neighbours along the last."""


def init_distributed(
    shape: Sequence[int] | None = None,
    axes: Sequence[str] = ("tp",),
    *,
    device: torch.device | str | None = None,
    timeout: timedelta = TIMEOUT,
) -> DeviceMesh:
    """Join the processes that torchrun started, and arrange them in a mesh.

    On CUDA each process takes the GPU of its local rank. A process group that is there already is used as it is; on
    CPU, one that this makes is left when the process ends.

    Args:
        shape: ranks along each axis; all of them on one if it is left out.
        axes: the name of each axis. Along those that begin with "dp" ranks have tokens of their own.
        device: "cuda" for NCCL or "cpu" for Gloo; CUDA where there is one, if it is left out.
        timeout: after which a rank that waits for another gives up with an error.

    Raises:
        RuntimeError: this process was not started by torchrun.
        ValueError: the shape does not hold as many ranks as there are.

    Under `torchrun --nproc-per-node 4`, `init_distributed((2, 2), ("dp", "tp"))["tp"]` is this rank's pair.
    """
    if isinstance(axes, str):
        raise TypeError(f"init_distributed: axes is {axes!r}. Give a name for each axis: axes=({axes!r},).")
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if not distributed.is_initialized():
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise RuntimeError(f"init_distributed: {missing[0]} is not set. Start the script with torchrun: {LAUNCH}")
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
        if kind == "cpu":
            atexit.register(_leave)
    num_ranks = distributed.get_world_size()
    shape = tuple(shape or (num_ranks,))
    held = torch.Size(shape).numel()
    if held != num_ranks or len(shape) != len(axes):
        raise ValueError(
            f"init_distributed: a mesh {dict(zip(axes, shape, strict=False))} of {len(axes)} axes and shape {shape} "
            f"holds {held} ranks, and there are {num_ranks}. Give a shape whose product is {num_ranks}, and one name "
            "for each axis."
        )
    return init_device_mesh(kind, shape, mesh_dim_names=tuple(axes))


def _leave() -> None:
    # Gloo's threads, still running when the process ends, may abort it.
    if distributed.is_initialized():
        distributed.destroy_process_group()


def as_data(mesh: DeviceMesh | Mapping[str, int] | Shape | None) -> DeviceMesh | Shape | None:
    """A mesh as wrappers keep it: one that is said as a mapping becomes pairs, which can be compared and hashed.

    Example:
        >>> as_data({"ep": 2, "tp": 8})
        (('ep', 2), ('tp', 8))
    """
    return tuple(mesh.items()) if isinstance(mesh, Mapping) else mesh


def check_axis(mesh: object, degree: object, own: str, what: str) -> None:
    """Raise `TypeError` or `ValueError` unless these can be a mesh axis, called `own` in a shape, and a degree."""
    if isinstance(mesh, tuple):
        _check_shape(mesh, degree, own, what)
    elif mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{what}: mesh is {mesh!r}, not an axis of a DeviceMesh, such as init_distributed()['tp'], nor its shape, "
            "such as {'ep': 2, 'tp': 8}."
        )
    if degree is not None and (not isinstance(degree, int) or isinstance(degree, bool) or degree < 1):
        raise ValueError(f"{what}: degree is {degree!r}. Give a number of ranks, from 1 up.")


def _check_shape(mesh: tuple[Any, ...], degree: object, own: str, what: str) -> None:
    for pair in mesh:
        name, size = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
        if not isinstance(name, str) or type(size) is not int or size < 1:
            raise ValueError(f"{what}: mesh has {pair!r}. Give names and numbers of ranks: {{'ep': 2, 'tp': 8}}.")
    names = [name for name, _ in mesh]
    if len(set(names)) < len(names) or own not in names:
        raise ValueError(f"{what}: the axes of mesh are {names}. Give each its name, and one the name {own!r}.")
    if degree is not None:
        raise ValueError(f"{what}: mesh says how many ranks are along {own!r}, and so does degree. Give one of them.")


def names_of(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of the axes of a mesh."""
    return tuple(cast(Any, mesh).mesh_dim_names)


def why_no_axis(mesh: DeviceMesh | Shape | None, degree: int | None, device: torch.device) -> str | None:
    """Why a model on `device` cannot be spread over these ranks (all there are, without a mesh), or None."""
    if not distributed.is_available() or not distributed.is_initialized():
        return (
            "there is no process group. Start the script with torchrun, and begin it with "
            f"gptoss_opt.init_distributed():  {LAUNCH}"
        )
    if mesh is None:
        num_ranks = distributed.get_world_size()
        if degree is not None and num_ranks % degree:
            return f"degree={degree} does not divide the {num_ranks} processes there are. Start a multiple of {degree}."
        return None
    if isinstance(mesh, tuple):
        held, started = math.prod(size for _, size in mesh), distributed.get_world_size()
        if held != started:
            return f"a mesh {dict(mesh)} is of {held} ranks, and there are {started} processes. Start {held}."
        return None
    if mesh.mesh_dim_names is None:
        return "the mesh has no axis names. Make it with gptoss_opt.init_distributed(shape, axes)."
    if mesh.ndim != 1:
        first = mesh.mesh_dim_names[-1]
        return f"the mesh has {mesh.ndim} axes, {mesh.mesh_dim_names}. Give one of them, such as mesh[{first!r}]."
    if mesh.get_coordinate() is None:
        return f"rank {distributed.get_rank()} is not in the mesh, which has the ranks {mesh.mesh.tolist()}."
    if degree is not None and degree != mesh.size():
        return f"degree={degree}, but axis {names_of(mesh)[0]!r} of the mesh has {mesh.size()} ranks. Give one of them."
    if mesh.device_type != device.type:
        return (
            f"the mesh is of {mesh.device_type} ranks, and the model is on {device}. Move the model first, or make a "
            f"mesh with init_distributed(device={device.type!r})."
        )
    return None


def axis_of(mesh: DeviceMesh | Shape | None, degree: int | None, own: str, *, data_parallel: bool = False) -> Axis:
    """The axis over which a model is spread, as data: needs no other process. In a shape it is the one called `own`.

    Raises `ValueError` if there is neither mesh nor degree, and no process group to tell the number of ranks.
    """
    if isinstance(mesh, tuple):
        return Axis(own, dict(mesh)[own], data_parallel)
    if mesh is not None:
        return Axis(names_of(mesh)[0], mesh.size(), data_parallel)
    if degree is None and not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(f"no process group tells how many ranks there are. Give degree, or start with {LAUNCH}")
    return Axis(NEIGHBOURS, degree or distributed.get_world_size(), data_parallel)


def bound_axis(mesh: DeviceMesh | Shape | None, degree: int | None, own: str, device: torch.device) -> DeviceMesh:
    """The mesh axis: the one given, or `own` of a shape; else neighbours, groups of which are data parallel."""
    if isinstance(mesh, DeviceMesh):
        return mesh
    if mesh is not None:
        return _meshed(mesh, own, device.type, _world())
    num_ranks = distributed.get_world_size()
    degree = degree or num_ranks
    shape = (("dp", num_ranks // degree), (NEIGHBOURS, degree))
    return _meshed(shape if degree < num_ranks else shape[1:], NEIGHBOURS, device.type, _world())


def _world() -> ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None
    return group


def _meshed(shape: Shape, axis: str, kind: str, world: ProcessGroup) -> DeviceMesh:
    mesh = _whole_mesh(shape, kind, world)
    return mesh[axis] if len(shape) > 1 else mesh


@functools.lru_cache
def _whole_mesh(shape: Shape, kind: str, world: ProcessGroup) -> DeviceMesh:
    names, sizes = zip(*shape, strict=True)
    return init_device_mesh(kind, sizes, mesh_dim_names=names)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one was cut out of, or itself."""
    return cast(DeviceMesh, cast(Any, mesh)._get_root_mesh())


def join(first: DeviceMesh, second: DeviceMesh) -> DeviceMesh:
    """The mesh of the axes of both. Raises `ValueError` unless they are axes of one mesh."""
    root = root_of(first)
    names = (*names_of(first), *names_of(second))
    ordered = tuple(name for name in names_of(root) if name in names)
    if root != root_of(second) or set(ordered) != set(names):
        raise ValueError(
            f"{first} and {second} are no axes of one mesh. Give the same axis to both, or make a mesh of two: "
            'mesh = gptoss_opt.init_distributed((2, 2), ("ep", "tp")); mesh["ep"], mesh["tp"].'
        )
    return root if root.mesh_dim_names == ordered else root[ordered]


def ranks_of(mesh: DeviceMesh | Shape | None) -> list[int]:
    """All ranks of the mesh that this one was cut out of; all there are of a shape, or if there is none."""
    if isinstance(mesh, DeviceMesh):
        return sorted(root_of(mesh).mesh.flatten().tolist())
    return list(range(distributed.get_world_size()))
