"""Plans beside what processes really hold and do: the peak of memory of stacks, and the rate of decoding.

Each stack holds four layers of the 20b's shapes and its head, loaded by processes of their own: their resident memory
at its peak, above what it was before anything was loaded.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import spawn

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import forget_peak, read_rate, resident, seconds
from benchmarks.load import checkpoint
from benchmarks.machine import Machine
from gptoss_opt import (
    ContinuousBatcher,
    Plan,
    Stack,
    compose,
    load,
    plan,
    shard_experts,
    shard_tensor_parallel,
    with_chunked_loss,
    with_fast_experts,
    with_fast_linears,
    with_flash_attention,
    with_full_finetuning,
    with_lora,
    with_mxfp4_experts,
)
from gptoss_opt.model.training import CHECKPOINTING
from gptoss_opt.planner import hardware
from gptoss_opt.planner.hardware import Device
from gptoss_opt.planner.memory import memory_of
from gptoss_opt.planner.target import target_of
from gptoss_opt.planner.workload import Task, Workload

LAYERS = 4
ALLOWED, ABOVE = 0.10, 0.05
"""How far a plan may be from what is measured, and how far below it."""
DECODE_ALLOWED = 0.25
NEW_TOKENS = 16
MACHINE, FAR, OF_A_BATCH = "cpu:5.2GB", 65_536, 512
"""A machine that the weights of these layers nearly fill, what does not fit there, and the context of a batch."""

PACKED = compose(with_mxfp4_experts(), with_flash_attention(), with_fast_linears())
DENSE = compose(with_fast_experts(), with_flash_attention(), with_fast_linears())
LORA = compose(with_mxfp4_experts(), with_flash_attention(), with_lora())
DENSE_LORA = compose(with_flash_attention(), with_lora(), with_chunked_loss())
FULL = compose(with_flash_attention(), with_full_finetuning(), with_chunked_loss())
TENSOR, EXPERTS = shard_tensor_parallel(degree=2), shard_experts(degree=2)


@dataclass(frozen=True)
class Peak(Case):
    """The peak of one stack at some work, planned and measured; of several ranks, that of the fullest."""

    folder: Path
    stack: Stack
    work: Workload
    ranks: int = 1
    columns = """
        case   | planned           | measured           | planned / measured
        {case} | {planned!G:.2f} GB | {measured!G:.2f} GB | {ratio:.3f}
    """

    def setup(self) -> Path:
        return checkpoint(self.folder, LAYERS)

    def run(self, made: Path, repeats: int) -> list[Point]:
        target = target_of(made)
        device = Device("cpu", "CPU", 0, 1.0, 1.0, 1.0)
        memory = memory_of(target.config, target.held(self.stack), self.stack, self.work, device)
        measured, planned = peak_of(made, self.stack, self.work, self.ranks), memory.num_bytes
        return [{"planned": planned, "measured": measured, "ratio": planned / measured, "memory": memory.lines}]

    def verify(self, made: Path, points: list[Point]) -> None:
        """Each rank has answered, with more than its weights."""
        assert points[0]["measured"] > sum(
            count for label, count in points[0]["memory"].items() if label.startswith("weights")
        )

    def missed(self, points: list[Point]) -> list[str]:
        ratio = points[0]["ratio"]
        right = 1 - ABOVE <= ratio <= 1 + ALLOWED
        return [] if right else [f"{self.name}: planned / measured is {ratio:.3f}"]


@dataclass(frozen=True)
class Largest(Case):
    """The largest context, or batch, that a plan names for a machine, and twice that, at work: does each fit, or not?

    Weights are read rather than mapped, as a plan so near to the machine's memory would map them: the system can drop
    what is mapped, so that a peak of it says little.
    """

    folder: Path
    task: Task
    size: Literal["context", "batch"]
    columns = """
        case   | usable          | the largest that fits | measured           | twice as large, measured
        {case} | {usable!G:.2f} GB | {largest:,} {size}     | {measured!G:.2f} GB | {twice!G:.2f} GB
    """

    def setup(self) -> Path:
        return checkpoint(self.folder, LAYERS)

    def run(self, made: Path, repeats: int) -> list[Point]:
        def planned(number: int) -> Plan:
            context, batch = (number, 1) if self.size == "context" else (OF_A_BATCH, number)
            return plan(made, hardware=MACHINE, task=self.task, context=context, batch=batch)

        # Of what cannot be, a plan names the largest that can.
        largest = getattr(planned(FAR), f"max_{self.size}")
        both = planned(largest), planned(2 * largest)
        measured, twice = (peak_of(made, found.stack, found.work) for found in both)
        return [
            {
                "usable": both[0].usable,
                "size": self.size,
                "largest": largest,
                "planned": [found.peak_bytes for found in both],
                "fits": [found.fits for found in both],
                "measured": measured,
                "twice": twice,
            }
        ]

    def verify(self, made: Path, points: list[Point]) -> None:
        """The plan itself holds the largest for one that fits, and twice that for one that does not."""
        assert points[0]["fits"] == [True, False]

    def missed(self, points: list[Point]) -> list[str]:
        point = points[0]
        found = []
        if point["measured"] > (1 + ABOVE) * point["usable"]:
            found.append(f"{self.name}: {point['largest']:,} take {point['measured'] / 1e9:.2f} GB")
        if point["twice"] <= point["usable"]:
            found.append(f"{self.name}: twice as many take {point['twice'] / 1e9:.2f} GB, and fit")
        return found


def peak_of(path: Path, stack: Stack, work: Workload, ranks: int = 1) -> int:
    """The most bytes that a process holds while it loads a model and does some work; of several ranks, the fullest."""
    with tempfile.TemporaryDirectory() as folder:
        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        spawn(on_rank, (store.port, ranks, path, stack.to_json(), work, Path(folder)), nprocs=ranks)
        return max(int(file.read_text()) for file in Path(folder).iterdir())


def on_rank(rank: int, port: int, ranks: int, path: Path, stack: str, work: Workload, folder: Path) -> None:
    """Load a model and do some work; write the peak of this rank into a folder."""
    torch.set_num_threads(max(1, 2 // ranks))
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        store = TCPStore("127.0.0.1", port, None, False)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    before = forget_peak()
    model = load(path, Stack.from_json(stack))
    do(model, work)
    (folder / str(rank)).write_text(str(resident("VmHWM") - before))
    if ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def do(model: Any, work: Workload) -> None:
    """What a workload says, on random tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(2, model.config.vocab_size, (work.batch, work.context))
    if work.task == "serve":
        with ContinuousBatcher(model, max_num_sequences=work.batch, share_prefixes=False) as batcher:
            prompts = [row[:-NEW_TOKENS].tolist() for row in tokens]
            batcher.generate(prompts, max_new_tokens=NEW_TOKENS, progress=False, eos_token_id=[])
    elif not work.trains:
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(tokens[:, :-4], max_new_tokens=4, **options)
    else:
        model.train()
        if work.checkpointing and work.task == "lora":
            getattr(model, CHECKPOINTING)({"use_reentrant": False})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind: Any = torch.optim.SGD if work.optimizer == "sgd" else torch.optim.AdamW
        optimizer = kind(trained, lr=1e-4)
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@dataclass(frozen=True)
class Decoding(Case):
    """The rate of decoding of one sequence, planned and measured, and how long a plan takes."""

    folder: Path
    columns = """
        case   | planned                | measured                | planned / measured | seconds to plan
        {case} | {planned:.1f} tokens/s | {measured:.1f} tokens/s | {ratio:.2f}        | {seconds:.2f}
    """

    def setup(self) -> Any:
        at = checkpoint(self.folder, LAYERS)
        return at, load(at, PACKED)

    def run(self, made: Any, repeats: int) -> list[Point]:
        path, model = made
        prompt = torch.randint(2, 200_000, (1, 64 - NEW_TOKENS))
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        runs = [
            partial(model.generate, prompt, max_new_tokens=number, min_new_tokens=number, **options)
            for number in (1, 1 + NEW_TOKENS)
        ]
        runs[0]()
        turns = []
        for _ in range(max(5, repeats)):
            # The rate of this machine's memory moves: each turn measures it anew, as a plan in a new process does.
            hardware.read_rate.cache_clear()
            hardware.detected()
            begin = time.perf_counter()
            planned = plan(path, context=64).speed["decode"].tokens_per_second
            taken = time.perf_counter() - begin
            fewer, more = (seconds(run) for run in runs)
            turns.append((planned, NEW_TOKENS / (more - fewer), taken))
        planned, measured, taken = (statistics.median(some) for some in zip(*turns, strict=True))
        ratio = statistics.median(one / other for one, other, _ in turns)
        return [{"planned": planned, "measured": measured, "ratio": ratio, "seconds": taken}]

    def verify(self, made: Any, points: list[Point]) -> None:
        assert points[0]["measured"] > 0

    def missed(self, points: list[Point]) -> list[str]:
        ratio = points[0]["ratio"]
        return [] if abs(ratio - 1) <= DECODE_ALLOWED else [f"{self.name}: planned / measured is {ratio:.2f}"]

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        return points


LARGEST: tuple[tuple[Task, Literal["context", "batch"]], ...] = (
    ("generate", "context"),
    ("generate", "batch"),
    ("lora", "context"),
)
"""Tasks, and of what the largest is looked for."""


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Thirteen stacks, the largest sizes that fit, and decoding."""
    peaks = {
        "packed, 2,048 tokens": (PACKED, Workload("generate", 2048)),
        "dense, 2,048 tokens": (DENSE, Workload("generate", 2048)),
        "packed, 4 sequences of 512 tokens": (PACKED, Workload("generate", 512, 4)),
        "packed, 16,384 tokens": (PACKED, Workload("generate", 16384)),
        "ContinuousBatcher, 8 sequences of 1,024": (PACKED, Workload("serve", 1024, 8)),
        "LoRA on packed, chunked loss, 1,024": (compose(LORA, with_chunked_loss()), Workload("lora", 1024)),
        "LoRA on packed, checkpointed, 2,048": (
            compose(LORA, with_chunked_loss()),
            Workload("lora", 2048, checkpointing=True),
        ),
        "LoRA on packed, all logits, 512": (LORA, Workload("lora", 512)),
        "LoRA on dense, chunked loss, 512": (DENSE_LORA, Workload("lora", 512)),
        "all parameters, SGD, 256": (FULL, Workload("full", 256, checkpointing=True, optimizer="sgd")),
    }
    sharded = {
        "tensor parallel, packed, 2,048": compose(TENSOR, PACKED),
        "expert parallel, dense, 1,024": compose(EXPERTS, DENSE),
        "tensor and expert parallel, packed, 2,048": compose(TENSOR, EXPERTS, PACKED),
    }
    return [
        *(Peak(f"memory: {name}", folder, *both) for name, both in peaks.items()),
        *(
            Peak(f"memory: {name}", folder, stack, Workload("generate", 1024 if "1,024" in name else 2048), 2)
            for name, stack in sharded.items()
        ),
        *(Largest(f"largest {size}: {task}", folder, task, size) for task, size in LARGEST),
        Decoding("decoding", folder),
        Machine("machine", {"read GB/s": read_rate}),
    ]


SETTINGS = Settings()
