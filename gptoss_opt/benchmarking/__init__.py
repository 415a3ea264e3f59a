"""How fast a checkpoint is with the wrappers on this machine, beside transformers and beside the machine's limit."""

from .bench import bench
from .report import Benchmark
