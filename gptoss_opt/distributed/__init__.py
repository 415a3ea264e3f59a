"""Several processes on one model: how sizes are split, and collectives that autograd sees through."""

from .collectives import all_reduce_gradient, all_reduce_output, all_to_all
from .mesh import init_distributed
from .split import balance_experts, split

__all__ = [
    "all_reduce_gradient",
    "all_reduce_output",
    "all_to_all",
    "balance_experts",
    "init_distributed",
    "split",
]
