"""Several processes on one model: meshes, how sizes are split, local shards, and what ranks send each other."""

from .agreement import disagreements, exchanged
from .collectives import (
    add_once,
    all_gather_last,
    all_reduce_gradient,
    all_reduce_output,
    all_to_all,
    exchange_counts,
    mean_gradient,
)
from .local import Rule, attributes, refuse_foreign, with_local_parameters, with_whole_parameters
from .mesh import Shape, as_data, axis_of, bound_axis, check_axis, init_distributed, ranks_of, why_no_axis
from .model_mesh import ModelMesh, Region
from .parts import local_part, sum_of_parts
from .split import balance_experts, split
