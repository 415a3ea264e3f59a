"""Starting torch.distributed, and the mesh of its ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = timedelta(minutes=3)
"""How long a rank waits for the others: short enough for a person to wait for it."""

LAUNCH = "torchrun --nproc-per-node 2 your_script.py"


def init_distributed(
    shape: Sequence[int] | None = None,
    axes: Sequence[str] = ("tp",),
    *,
    device: torch.device | str | None = None,
    timeout: timedelta = TIMEOUT,
) -> DeviceMesh:
    """Join the processes that torchrun started, and arrange them in a mesh.

    On CUDA each process takes the GPU of its local rank. A process group that is there already is used as it is.

    Args:
        shape: ranks along each axis; all of them on one if it is left out.
        axes: the name of each axis.
        device: "cuda" for NCCL or "cpu" for Gloo; CUDA where there is one, if it is left out.
        timeout: after which a rank that waits for another gives up with an error.

    Raises:
        RuntimeError: this process was not started by torchrun.
        ValueError: the shape does not hold as many ranks as there are.

    Under `torchrun --nproc-per-node 4`, `init_distributed((2, 2), ("dp", "tp"))["tp"]` is this rank's pair.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if not distributed.is_initialized():
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise RuntimeError(f"init_distributed: {missing[0]} is not set. Start the script with torchrun: {LAUNCH}")
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
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
