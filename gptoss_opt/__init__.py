"""Composable wrappers that make a Hugging Face GPT-OSS model fast and small, and keep it the same model."""

from .benchmarking import Benchmark, bench
from .checkpoint import CheckpointError, gather_state_dict, load, save_adapter
from .core import BackendError, CompatibilityError, IrreversibleError, Stack, Wrapper, compose, explain, stack_of, undo
from .distributed import balance_experts, init_distributed
from .doctor import doctor
from .model.adapters import adapters_off
from .planner import HardwareError, Plan, PlanError, optimize, plan
from .serve import ContinuousBatcher, GenerationError
from .train import Rollouts, export, load_adapter, merge_lora
from .verification import Verification, verify
from .version import __version__
from .wrappers.chunked_loss import with_chunked_loss
from .wrappers.expert_parallel import shard_experts
from .wrappers.fast_experts import with_fast_experts
from .wrappers.fast_linears import with_fast_linears
from .wrappers.flash_attention import with_flash_attention
from .wrappers.full_finetuning import with_full_finetuning
from .wrappers.lora import with_lora
from .wrappers.monitor import monitor_of, with_monitor
from .wrappers.mxfp4_experts import with_mxfp4_experts
from .wrappers.tensor_parallel import shard_tensor_parallel

__all__ = [
    "BackendError",
    "Benchmark",
    "CheckpointError",
    "CompatibilityError",
    "ContinuousBatcher",
    "GenerationError",
    "HardwareError",
    "IrreversibleError",
    "Plan",
    "PlanError",
    "Rollouts",
    "Stack",
    "Verification",
    "Wrapper",
    "__version__",
    "adapters_off",
    "balance_experts",
    "bench",
    "compose",
    "doctor",
    "explain",
    "export",
    "gather_state_dict",
    "init_distributed",
    "load",
    "load_adapter",
    "merge_lora",
    "monitor_of",
    "optimize",
    "plan",
    "save_adapter",
    "shard_experts",
    "shard_tensor_parallel",
    "stack_of",
    "undo",
    "verify",
    "with_chunked_loss",
    "with_fast_experts",
    "with_fast_linears",
    "with_flash_attention",
    "with_full_finetuning",
    "with_lora",
    "with_monitor",
    "with_mxfp4_experts",
]
