"""The ways in which some work can be done on a machine: stacks of wrappers, each with what it takes and how fast it is.

They come in the order in which they are preferred: what gives up least is first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core import CompatibilityError, Stack, Wrapper, compose
from ..layout import LayoutError
from ..wrappers.chunked_loss import with_chunked_loss
from ..wrappers.expert_parallel import shard_experts
from ..wrappers.fast_experts import with_fast_experts
from ..wrappers.fast_linears import with_fast_linears
from ..wrappers.flash_attention import with_flash_attention
from ..wrappers.full_finetuning import with_full_finetuning
from ..wrappers.lora import with_lora
from ..wrappers.mxfp4_experts import with_mxfp4_experts
from ..wrappers.tensor_parallel import shard_tensor_parallel
from .hardware import Hardware
from .memory import Memory, memory_of
from .parameters import Parameters
from .speed import Rate, speed_of
from .target import Target
from .workload import Workload

EXPERTS_FROM = 4
"""From so many devices on experts are placed whole: slices of each would be thin, and products of them slow."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Option:
    """One way.

    Attributes:
        stack: the wrappers.
        work: what is done, with what the way itself settles, such as the optimizer.
        held: the parameters of the fullest device.
        memory, speed: what it takes there, and how fast all devices together are.
        gives_up: what it does that others need not, as sentences.
    """

    stack: Stack
    work: Workload
    held: Parameters
    memory: Memory
    speed: Mapping[str, Rate]
    gives_up: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Tokens a second of decoding, or of training."""
        return self.speed["training" if self.work.trains else "decode"].tokens_per_second


def options(target: Target, hardware: Hardware, work: Workload) -> Iterator[Option]:
    """All ways to do some work with a model on a machine; those that cannot be laid out are left out.

    Raises:
        LayoutError: none can be laid out. Says why the last one cannot.
    """
    problem, found = None, False
    for placement in placements(hardware):
        for wrappers, settled, gives_up in _ways(target, hardware, work):
            try:
                stack = _on(target, (*wrappers, *placement))
                held = target.held(stack)
            except (LayoutError, CompatibilityError, ValueError) as error:
                problem = error
                continue
            found = True
            memory = memory_of(target.config, held, stack, settled, hardware.device)
            yield Option(stack, settled, held, memory, speed_of(target.config, held, settled, hardware), gives_up)
    if not found:
        raise LayoutError(f"there is no way to lay this model out on {hardware}: {problem}") from problem


def _on(target: Target, wrappers: Sequence[Wrapper]) -> Stack:
    """A stack of wrappers, with those that are on the model already as they are. Raises `CompatibilityError`."""
    already = target.already
    names = {wrapper.name for wrapper in wrappers}
    kept = [wrapper for name, wrapper in already.items() if name not in names]
    return compose(*(already.get(wrapper.name, wrapper) for wrapper in wrappers), *kept)


def placements(hardware: Hardware) -> list[tuple[Wrapper, ...]]:
    """The ways to spread a model over devices, those within a node first; the last keeps it whole on each.

    A model that several nodes share is spread over two axes first: attention, the vocabulary and a slice of each expert
    are inside a node, and experts across nodes, so that only what experts give crosses the network.

    Example:
        >>> from gptoss_opt.planner import described
        >>> placements(described("2x24GB"))[0]
        (shard_tensor_parallel(degree=2),)
        >>> placements(described("2x(8xH100)"))[3]
        (shard_tensor_parallel(mesh=(('ep', 2), ('tp', 8))), shard_experts(mesh=(('ep', 2), ('tp', 8))))
    """
    found: list[tuple[Wrapper, ...]] = []
    for degree in dict.fromkeys((hardware.per_node, hardware.count)):
        if degree > hardware.per_node > 1:
            mesh = {"ep": hardware.nodes, "tp": hardware.per_node}
            found.append((shard_tensor_parallel(mesh=mesh), shard_experts(mesh=mesh)))
        if degree == 1:
            found.append(())
        else:
            tensor, experts = shard_tensor_parallel(degree=degree), shard_experts(degree=degree)
            both = [(tensor, experts), (tensor,)] if degree >= EXPERTS_FROM else [(tensor,), (tensor, experts)]
            found += [*both, (experts,)]
    return found if () in found else [*found, ()]


def _ways(
    target: Target, hardware: Hardware, work: Workload
) -> Iterator[tuple[list[Wrapper], Workload, tuple[str, ...]]]:
    flash, loss, packed = with_flash_attention(), with_chunked_loss(), with_mxfp4_experts()
    rounded = () if target.packed else ("the experts' weights are rounded to MXFP4: explain(model) says how far",)
    if work.task == "full":
        for optimizer in ("adamw", "adamw_8bit", "adafactor"):
            full = with_full_finetuning(optimizer_state=optimizer)
            less = () if optimizer == "adamw" else (f"the optimizer is {optimizer}, whose state is smaller",)
            yield [flash, full, loss], replace(work, optimizer=optimizer, checkpointing=True), less
        return
    if work.task == "lora":
        again = "layers are computed again in the backward pass (gradient checkpointing)"
        for lossy in (False, True):
            if lossy and target.packed:
                return
            held, less = ([packed], rounded) if target.packed or lossy else ([], ())
            yield [*held, flash, with_lora(), loss], work, less
            checkpointed = replace(work, checkpointing=True)
            yield [*held, flash, with_lora(), loss], checkpointed, (*less, again)
            fewer = "only attention is adapted, not the experts"
            yield [*held, flash, with_lora(targets=ATTENTION), loss], checkpointed, (*less, again, fewer)
        return
    linears = [with_fast_linears()] if hardware.device.kind == "cpu" else []
    if not target.packed:
        yield [with_fast_experts(), flash, *linears], work, ()
    yield [packed, flash, *linears], work, rounded


def most(target: Target, hardware: Hardware, option: Option, name: str) -> int:
    """The largest context, or batch, that fits in the way of an option; 0 if not even one does.

    Args:
        target, hardware, option: what is done where, and how.
        name: "context" or "batch".
    """

    def fits(number: int) -> bool:
        work = replace(option.work, context=number) if name == "context" else replace(option.work, batch=number)
        memory = memory_of(target.config, option.held, option.stack, work, hardware.device)
        return memory.num_bytes <= hardware.device.usable

    limit = target.config.max_position_embeddings if name == "context" else 1 << 20
    if not fits(1):
        return 0
    low, high = 1, limit + 1
    while high - low > 1:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
