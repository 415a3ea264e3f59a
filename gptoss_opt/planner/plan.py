"""`plan`: the wrappers for a model, a machine and a task, with their reasons, memory and speed. Applies nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core import Stack
from ..kernels.triton import MIN_CAPABILITY
from ..layout import LayoutError
from ..model.training_memory import written
from ..table import Table
from .cards import CARDS, Card
from .code import code_of, launch_of
from .hardware import Hardware, described, machine_of
from .memory import Memory
from .options import Option, most, options
from .reasons import reasons_for
from .speed import Rate
from .target import PLACEHOLDER, Target, target_of
from .workload import Objective, Task, Workload

OBJECTIVES = ("fit", "latency", "throughput")
SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Of the memory of machines without a GPU, in GB."""
TIGHT = 0.85
"""From this part of a CPU's memory on, weights are mapped from their files, so that the system can drop them."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` found: prints as tables, shows as HTML in a notebook, and holds the facts.

    Attributes:
        title: the model, the work and the machine, in words.
        hardware: the machine.
        work: what is done, with what the plan settles, such as the optimizer.
        stack: the wrappers.
        reasons: by wrapper, why it is taken or why not, for all there are.
        memory: what the fullest device holds at its peak.
        usable: the bytes that a process can have there.
        speed: rates by "decode" and "prefill", or "training".
        max_context, max_batch: the largest that fit, the other one as it is; 0 if none does.
        warnings: what the plan gives up, and what it rests on.
        to_fit: where it does not fit, what would make it fit, the cheapest change first.
        source: the folder or name that is loaded; None for a model that is there.
        ranks: how many devices hold the model together.
        memory_map: whether weights are mapped from their files.
        code: Python that does it.
        launch: the command that starts a script with that code, where there are several devices.
    """

    title: str
    hardware: Hardware
    work: Workload
    stack: Stack
    reasons: Mapping[str, str]
    memory: Memory
    usable: int
    speed: Mapping[str, Rate]
    max_context: int
    max_batch: int
    warnings: tuple[str, ...]
    to_fit: tuple[str, ...]
    source: str | None
    ranks: int
    memory_map: bool
    code: str
    launch: str | None

    @property
    def peak_bytes(self) -> int:
        """What the fullest device holds at its peak, above what the process held before."""
        return self.memory.num_bytes

    @property
    def fits(self) -> bool:
        """Whether it can be done."""
        return self.peak_bytes <= self.usable

    @property
    def headroom(self) -> int:
        """The bytes that are left; below zero, those that are missing."""
        return self.usable - self.peak_bytes

    def hours(self, tokens: float) -> float:
        """How long training on so many tokens takes. Raises `ValueError` where nothing is trained."""
        if not 0 <= tokens < float("inf"):
            raise ValueError(f"tokens is {tokens}. Give a number from 0 up.")
        if "training" not in self.speed:
            raise ValueError(f"the task is {self.work.task!r}, which trains nothing. Plan with task='lora' or 'full'.")
        return tokens / self.speed["training"].tokens_per_second / 3600

    @property
    def verdict(self) -> str:
        """Whether it fits, in a sentence."""
        peak, usable = self.peak_bytes / 1e9, self.usable / 1e9
        each = "each device" if self.hardware.count > 1 else "the device"
        if self.fits:
            sizes = f"context up to {self.max_context:,}, or batch up to {self.max_batch:,}"
            return f"It fits: {peak:,.1f} of {usable:,.1f} GB on {each}; {sizes}."
        return f"It does not fit: {peak:,.1f} GB are needed on {each}, {peak - usable:,.1f} more than there are."

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return {
            "title": self.title,
            "hardware": str(self.hardware),
            "work": vars(self.work),
            "stack": self.stack.to_json(),
            "reasons": dict(self.reasons),
            "memory": self.memory.lines,
            "peak_bytes": self.peak_bytes,
            "usable": self.usable,
            "fits": self.fits,
            "headroom": self.headroom,
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "speed": {name: {**vars(rate)} for name, rate in self.speed.items()},
            "warnings": list(self.warnings),
            "to_fit": list(self.to_fit),
            "source": self.source,
            "ranks": self.ranks,
            "memory_map": self.memory_map,
            "code": self.code,
            "launch": self.launch,
        }

    @property
    def tables(self) -> tuple[Table, Table, Table]:
        """Memory, speed, and wrappers."""
        rows = [(label, written(count)) for label, count in self.memory.lines.items()]
        memory = Table(("memory of the fullest device", "bytes"), [*rows, ("in all", written(self.peak_bytes))])
        speed = Table(("speed", "estimate"), [(name, str(rate)) for name, rate in self.speed.items()])
        taken = {wrapper.name: repr(wrapper) for wrapper in self.stack}
        names = sorted(self.reasons, key=lambda name: name not in taken)
        wrappers = [(taken.get(name, name), "yes" if name in taken else "no", self.reasons[name]) for name in names]
        return memory, speed, Table(("wrapper", "taken", "why"), wrappers, (34, 5, 66))

    @property
    def notes(self) -> list[str]:
        """Warnings, and what would make it fit, as sentences."""
        return [*(f"Note: {one}." for one in self.warnings), *(f"To make it fit: {one}." for one in self.to_fit)]

    @property
    def script(self) -> str:
        """The code, below the command that starts it where there is one."""
        return self.code if self.launch is None else f"# {self.launch}\n{self.code}"

    def __str__(self) -> str:
        parts = [f"{self.title}\n{self.verdict}", *map(str, self.tables), *self.notes, self.script]
        return "\n\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in (self.title, self.verdict))
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in self.notes)
        tables = "".join(table._repr_html_() for table in self.tables)
        return f"{lines}{tables}{notes}<pre style='white-space:pre;overflow-x:auto'>{html.escape(self.script)}</pre>"


def plan(
    model: Any,
    *,
    hardware: str | Hardware | None = None,
    task: Task = "generate",
    context: int = 4096,
    batch: int = 1,
    objective: Objective = "fit",
) -> Plan:
    """The wrappers for a model, a machine and a task, with reasons, memory, speed and code. Applies and loads nothing.

    Args:
        model: a GPT-OSS model, a folder, a name on the Hugging Face hub that is in its cache, a config, or "20b" or
            "120b" for the released ones.
        hardware: this machine, if it is left out; or one in words: "2x24GB", "1xH200", "4xA100-40GB", "cpu:24GB",
            "2x(8xH100)".
        task: "generate"; "serve", by continuous batching, for requests of various lengths; "lora" or "full"
            finetuning.
        context: tokens of a sequence, or of a row of training.
        batch: sequences at once.
        objective: what is preferred of all that fits: "fit", the least that is given up; "latency", the fastest for
            the batch that is given; "throughput", most tokens a second of all devices together.

    Returns:
        The plan, which also says what would make it fit if it does not.

    Raises:
        HardwareError: the machine is not understood.
        CheckpointError: there is no such checkpoint.
        LayoutError: the model cannot be laid out on so many devices.
        ValueError: a task, a size or an objective that there is not.

    Example:
        >>> found = plan("20b", hardware="2x24GB")
        >>> found.fits, [wrapper.name for wrapper in found.stack][-1]
        (True, 'shard_tensor_parallel')
        >>> plan("120b", hardware="1x24GB").verdict
        'It does not fit: 66.6 GB are needed on the device, 43.1 more than there are.'
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}. Use one of {', '.join(map(repr, OBJECTIVES))}.")
    work = Workload(task, context, batch)
    machine = machine_of(hardware)
    target = target_of(model)
    option = chosen(target, machine, work, objective)
    return _plan_of(target, machine, option, work)


def chosen(target: Target, hardware: Hardware, work: Workload, objective: Objective) -> Option:
    """The best option that fits; if none does, the smallest."""
    found = list(options(target, hardware, work))
    fitting = [option for option in found if option.memory.num_bytes <= hardware.device.usable]
    if not fitting:
        return min(found, key=lambda option: option.memory.num_bytes)
    if objective == "fit":
        return fitting[0]
    # Replicas are tokens a second of several sequences: of no use to one that waits.
    replicas = (lambda option: hardware.count // option.held.ranks) if objective == "latency" else (lambda option: 1)
    return max(fitting, key=lambda option: option.rate / replicas(option))


def _plan_of(target: Target, hardware: Hardware, option: Option, asked: Workload) -> Plan:
    config, device, work = target.config, hardware.device, option.work
    peak = option.memory.num_bytes
    mapped = device.kind == "cpu" and target.source is not None and not work.trains and peak > TIGHT * device.memory
    name = f"gpt-oss, {config.num_hidden_layers} layers of {config.num_local_experts} experts"
    sequences = "a sequence" if work.batch == 1 else f"{work.batch:,} sequences"
    return Plan(
        title=f"{name}: {work.task!r} with {sequences} of {work.context:,} tokens, on {hardware}",
        hardware=hardware,
        work=work,
        stack=option.stack,
        reasons=reasons_for(target, hardware, option),
        memory=option.memory,
        usable=device.usable,
        speed=option.speed,
        max_context=most(target, hardware, option, "context"),
        max_batch=most(target, hardware, option, "batch"),
        warnings=tuple(_warnings(target, hardware, option, mapped)),
        source=target.source,
        ranks=option.held.ranks,
        memory_map=mapped,
        to_fit=() if peak <= device.usable else tuple(_to_fit(target, hardware, option, asked)),
        code=code_of(target, hardware, option, memory_map=mapped),
        launch=launch_of(hardware, option),
    )


def _warnings(target: Target, hardware: Hardware, option: Option, mapped: bool) -> list[str]:
    found = list(option.gives_up)
    if mapped:
        found.append("the weights are mapped from their files, so that the system can drop and read them again")
    if hardware.device.capability is not None and hardware.device.capability < MIN_CAPABILITY:
        least = ".".join(map(str, MIN_CAPABILITY))
        found.append(f"kernels for packed experts need compute capability {least}: here torch decodes them, far slower")
    if target.source == PLACEHOLDER:
        found.append(f"{PLACEHOLDER} in the code stands for the checkpoint")
    if option.work.context > (limit := target.config.max_position_embeddings):
        found.append(f"the model was made for {limit:,} tokens, fewer than the context of {option.work.context:,}")
    replicas = hardware.count // option.held.ranks
    if replicas > 1:
        how = "for rows of its own" if option.work.trains else "for requests of its own"
        found.append(f"{replicas} groups of {option.held.ranks} device(s) hold the model, each {how} (data parallel)")
    return found


def _to_fit(target: Target, hardware: Hardware, option: Option, asked: Workload) -> list[str]:
    """What would make it fit, the cheapest change first; each has been tried."""
    found = []

    def fits(machine: Hardware, work: Workload) -> bool:
        try:
            return any(one.memory.num_bytes <= machine.device.usable for one in options(target, machine, work))
        except LayoutError:
            return False

    if context := most(target, hardware, option, "context"):
        found.append(f"context={context} instead of {asked.context:,}")
    if asked.batch > 1 and (batch := most(target, hardware, option, "batch")):
        found.append(f"batch={batch} instead of {asked.batch:,}")
    if asked.task == "full" and fits(hardware, replace(asked, task="lora")):
        found.append("task='lora': the weights stay frozen, and their optimizer's state is not needed")
    if hardware.device.kind == "cpu":
        needed = next((size for size in SIZES if fits(described(f"cpu:{size}GB"), asked)), None)
        return [*found, f"a machine of {needed} GB: hardware='cpu:{needed}GB'"] if needed else found
    for times in (2, 4, 8, 16):
        more = replace(hardware, per_node=hardware.per_node * times)
        if more.per_node <= 8 and fits(more, asked):
            found.append(f"{more.count} of these devices instead of {hardware.count}")
            break
    better = [card for card in CARDS.values() if card.gigabytes * 1e9 > hardware.device.memory and _served(card)]
    sizes = sorted({card.gigabytes for card in better})

    def of(size: int, count: int) -> Hardware:
        return replace(hardware, device=replace(hardware.device, memory=size * 10**9), per_node=count)

    if size := next((size for size in sizes if fits(of(size, hardware.per_node), asked)), None):
        found.append(f"devices of {size} GB, such as {_name(size)}")
    if found:
        return found
    # Nothing alone is enough: more devices, and larger ones, and less to train.
    tasks: list[Task] = ["full", "lora"] if asked.task == "full" else [asked.task]
    for task in tasks:
        for count in (hardware.per_node, 8):
            if size := next((size for size in sizes if fits(of(size, count), replace(asked, task=task))), None):
                less = f", and task={task!r}" if task != asked.task else ""
                return [f"{count * hardware.nodes} devices of {size} GB, such as {_name(size)}{less}"]
    return found


def _served(card: Card) -> bool:
    return card.capability >= MIN_CAPABILITY


def _name(size: int) -> str:
    return next(name for name, card in CARDS.items() if card.gigabytes == size and _served(card))
