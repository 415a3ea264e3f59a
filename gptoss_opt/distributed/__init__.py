"""Several processes on one model: how sizes are split, meshes, and collectives that autograd sees through."""

from .agreement import disagreements
from .collectives import (
    add_once,
    all_gather_last,
    all_reduce_gradient,
    all_reduce_output,
    all_to_all,
    mean_gradient,
)
from .mesh import axis_name, axis_of, check_axis, degree_of, init_distributed, ranks_of, why_no_axis
from .model_mesh import ModelMesh, Sum, attributes
from .split import balance_experts, split

__all__ = [
    "ModelMesh",
    "Sum",
    "add_once",
    "all_gather_last",
    "all_reduce_gradient",
    "all_reduce_output",
    "all_to_all",
    "attributes",
    "axis_name",
    "axis_of",
    "balance_experts",
    "check_axis",
    "degree_of",
    "disagreements",
    "init_distributed",
    "mean_gradient",
    "ranks_of",
    "split",
    "why_no_axis",
]
