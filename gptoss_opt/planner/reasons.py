"""Why each wrapper is in a plan, or is not, in sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.spec import WRAPPERS
from ..kernels.mxfp4 import BLOCK
from ..model.training_memory import written
from .hardware import Hardware
from .memory import WHOLE_LOGITS
from .options import EXPERTS_FROM, Option
from .target import Target

EXPERT_VALUES = 3
"""Gate, up and down."""


class Case(NamedTuple):
    """What a reason may speak of."""

    target: Target
    hardware: Hardware
    option: Option

    @property
    def names(self) -> set[str]:
        """The wrappers of the plan."""
        return {wrapper.name for wrapper in self.option.stack}


def reasons_for(target: Target, hardware: Hardware, option: Option) -> dict[str, str]:
    """One sentence for every wrapper there is, by its name."""
    case = Case(target, hardware, option)
    found = {}
    for name in sorted(WRAPPERS):
        if name in target.already:
            found[name] = "it is on the model already"
            continue
        taken, left = REASONS.get(name, (_of_your_own, _of_your_own))
        found[name] = (taken if name in case.names else left)(case)
    return found


def _of_your_own(case: Case) -> str:
    return "it is not one of this package: apply it yourself if you want it"


def _flash(case: Case) -> str:
    work, config = case.option.work, case.target.config
    scores = work.batch * config.num_attention_heads * work.context**2 * 2
    return f"the scores of {work.context:,} tokens would take {written(scores)} in each layer; this never writes them"


def _experts_bytes(config: Any, bits: float) -> float:
    values = config.num_hidden_layers * config.num_local_experts * EXPERT_VALUES
    return float(values * config.hidden_size * config.intermediate_size * bits / 8)


def _packed(case: Case) -> str:
    packed, dense = (_experts_bytes(case.target.config, bits) for bits in (4.25, 16))
    how = "exactly as they are in the checkpoint" if case.target.packed else "rounded"
    return f"the experts take {written(packed)} packed, {how}, and {written(dense)} in bfloat16"


def _not_packed(case: Case) -> str:
    if case.option.work.task == "full":
        return "all parameters are trained, and packed weights take no gradient"
    config = case.target.config
    if odd := [size for size in (config.hidden_size, config.intermediate_size) if size % BLOCK]:
        return f"MXFP4 packs rows of a multiple of {BLOCK} values, and here are rows of {odd[0]}"
    return f"the checkpoint is dense: its experts, {written(_experts_bytes(config, 16))}, stay exact"


def _no_fast_experts(case: Case) -> str:
    if "with_mxfp4_experts" in case.names:
        return "with_mxfp4_experts brings its own computation of the experts"
    name = "with_full_finetuning" if case.option.work.task == "full" else "with_lora"
    return f"{name} lets the experts be computed as grouped products by itself"


def _no_linears(case: Case) -> str:
    if case.option.work.trains:
        return "it is for few rows, and training has many"
    return "it is for CPUs, and the model is on a GPU"


def _tensor(case: Case) -> str:
    held, ranks = case.option.held.num_bytes, case.option.held.ranks
    inside = f" inside its node of {case.hardware.per_node}" if "ep" in case.option.held.axes else ""
    parts = f"{written(held)} of weights and a part of all heads"
    return f"each of {ranks} devices holds {parts}, and they meet twice a layer{inside}"


def _not_spread(case: Case) -> str:
    if case.hardware.count == 1:
        return "there is one device"
    if "shard_experts" in case.names:
        heads = case.target.config.num_key_value_heads
        return f"{case.option.held.ranks} devices cannot share {heads} key heads evenly: attention is whole on each"
    return "each device holds the whole model, for tokens of its own"


def _placed(case: Case) -> str:
    count, ranks = case.target.config.num_local_experts, case.option.held.ranks
    if nodes := case.option.held.axes.get("ep"):
        return f"{count} experts are placed on {nodes} nodes: what they give is all that crosses the network"
    if "shard_tensor_parallel" not in case.names:
        heads = case.target.config.num_key_value_heads
        return f"{count} experts are placed whole on {ranks} devices, which cannot share {heads} key heads evenly"
    if ranks < EXPERTS_FROM:
        return f"{count} experts are placed whole on {ranks} devices, which is faster for this batch, or takes less"
    return f"from {EXPERTS_FROM} devices on experts are placed whole, here {count} on {ranks}: slices would be thin"


def _not_placed(case: Case) -> str:
    if case.option.held.ranks == 1:
        return _not_spread(case)
    if case.option.held.ranks >= EXPERTS_FROM:
        return "each device holds a slice of every expert, so that all of them hold and do as much"
    return f"{case.option.held.ranks} devices: slices of each expert are wide enough, and all devices work alike"


def _lora(case: Case) -> str:
    count = sum(case.option.held.trainable.values())
    return f"{count / 1e6:,.1f} million values are trained beside the frozen weights"


def _no_lora(case: Case) -> str:
    return f"the task is {case.option.work.task!r}: " + (
        "all parameters are trained" if case.option.work.task == "full" else "nothing is trained"
    )


def _full(case: Case) -> str:
    return f"all {sum(case.option.held.dense.values()) / 1e9:,.1f} billion values on a device are trained"


def _no_full(case: Case) -> str:
    task = case.option.work.task
    return f"the task is {task!r}: " + ("the weights stay frozen" if task == "lora" else "nothing is trained")


def _loss(case: Case) -> str:
    work, words = case.option.work, case.target.config.vocab_size
    whole = work.tokens * words * WHOLE_LOGITS
    return f"the logits of {work.tokens:,} tokens and their gradients would take {written(whole)}; a chunk takes less"


def _no_loss(case: Case) -> str:
    return "there is no loss: nothing is trained"


REASONS: dict[str, tuple[Callable[[Case], str], Callable[[Case], str]]] = {
    "with_flash_attention": (_flash, _of_your_own),
    "with_mxfp4_experts": (_packed, _not_packed),
    "with_fast_experts": (lambda case: "dense experts are grouped products, one per projection", _no_fast_experts),
    "with_fast_linears": (lambda case: "decoding reads all weights, here at the memory's speed", _no_linears),
    "shard_tensor_parallel": (_tensor, _not_spread),
    "shard_experts": (_placed, _not_placed),
    "with_lora": (_lora, _no_lora),
    "with_full_finetuning": (_full, _no_full),
    "with_chunked_loss": (_loss, _no_loss),
    "with_monitor": (_of_your_own, lambda case: "it only watches: add it where you want to see what a model does"),
}
"""By wrapper, why it is taken and why it is not."""
