"""The whole 20b on one GPU: one user's decoding and prompts, beside transformers, and many requests at once.

Packed experts are loaded from a random checkpoint; transformers has random dense weights of the same shapes, which are
made on the GPU (42 GB), and ours computes with those as well. Needs 64 GB of GPU memory, and 14 GB of disk unless
`--checkpoint FOLDER` names a packed 20b that is there.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import case
from benchmarks.attention import prefill_model
from benchmarks.case import Case, Point
from benchmarks.harness import alternate, device, read_rate
from benchmarks.load import bytes_per_token
from benchmarks.machine import Machine
from gptoss_opt import ContinuousBatcher, load, undo, with_fast_experts, with_flash_attention, with_mxfp4_experts
from gptoss_opt.model.experts import KEY
from gptoss_opt.testing import random_checkpoint

PROMPT, LONG_PROMPT, NEW_TOKENS = 64, 2048, 64
DENSE, PACKED, BATCHER = "ours, dense", "ours, packed", "ours, packed, ContinuousBatcher"
PEER = "transformers"


@dataclass(frozen=True)
class Settings(case.Settings):
    """What else can be set: a packed checkpoint of the 20b, if it need not be a random one."""

    checkpoint: str = ""


@functools.cache
def packed_model(at: Path) -> tuple[Any, float]:
    """The packed model, and how many seconds it took to load it from the system's cache."""
    if device().type != "cuda":
        raise SystemExit("one_gpu needs a GPU, and there is none.")
    if not at.exists():
        random_checkpoint(at, "20b", progress=True)
    for file in at.glob("*.safetensors"):
        file.read_bytes()
    begin = time.perf_counter()
    model = load(at, with_mxfp4_experts(), with_flash_attention(), device=device())
    torch.cuda.synchronize()
    return model, time.perf_counter() - begin


def tokens(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random tokens, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary - 2000, (length,), generator=generator).tolist()


@torch.no_grad()
def logits_of(model: Any, length: int) -> Tensor:
    """The logits after a prompt."""
    found: Tensor = model(torch.tensor([tokens(length, 200_000)], device=model.device), logits_to_keep=1).logits
    return found.float()


def dense_model(wrapped: bool) -> Any:
    """The dense model, as transformers has it, or with our attention and experts."""
    model = undo(prefill_model())
    return with_fast_experts(with_flash_attention(model)) if wrapped else model


def longer(runs: Mapping[int, Callable[[], object]], repeats: int) -> float:
    """How many seconds the run of more tokens takes longer than that of fewer."""
    times = alternate({str(number): run for number, run in runs.items()}, repeats)
    fewer, more = (statistics.median(times[str(number)]) for number in sorted(runs))
    return more - fewer


def generating(model: Any, count: int) -> list[int]:
    """Greedy tokens of `generate`."""
    prompt = torch.tensor([tokens(PROMPT, 200_000)], device=model.device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)
    return list(made[0, PROMPT:].tolist())


@dataclass(frozen=True)
class OneUser(Case):
    """Decoding, or a prompt, of one sequence."""

    folder: Path
    decodes: bool
    columns = """
        case   | contender | tokens/s     | ratio to transformers | of the read rate
        {case} | {name}    | {rate:.1f}   | {ratio:.2f}x          | {share:.0%}
    """

    def setup(self) -> Any:
        packed = packed_model(self.folder)[0]
        return {PEER: partial(dense_model, False), DENSE: partial(dense_model, True), PACKED: lambda: packed}, packed

    def run(self, made: Any, repeats: int) -> list[Point]:
        models, packed = made
        took: dict[str, float] = {}
        for name, model_of in models.items():
            model = model_of()
            if self.decodes:
                took[name] = longer({n: partial(generating, model, n) for n in (1, 1 + NEW_TOKENS)}, repeats)
            else:
                taken = alternate({name: partial(logits_of, model, LONG_PROMPT)}, repeats)[name]
                took[name] = statistics.median(taken)
        if not self.decodes:
            rates = {name: LONG_PROMPT / seconds for name, seconds in took.items()}
            return [{"tokens/s": rates, "ratio": {name: took[PEER] / seconds for name, seconds in took.items()}}]
        with closing(ContinuousBatcher(packed, kv_memory=1 << 30, max_num_sequences=1)) as batcher:
            options: dict[str, Any] = {"eos_token_id": [], "progress": False}
            prompt = [tokens(PROMPT, 200_000)]
            runs = {n: partial(batcher.generate, prompt, max_new_tokens=n, **options) for n in (1, 1 + NEW_TOKENS)}
            took[BATCHER] = longer(runs, repeats)
            graphs = batcher.stats().cuda_graphs
        read = {PEER: prefill_model(), DENSE: prefill_model(), PACKED: packed, BATCHER: packed}
        shares = {n: bytes_per_token(read[n]) * NEW_TOKENS / s / read_rate() for n, s in took.items()}
        rates = {name: NEW_TOKENS / seconds for name, seconds in took.items()}
        ratios = {name: took[PEER] / seconds for name, seconds in took.items()}
        return [{"tokens/s": rates, "ratio": ratios, "share of read rate": shares, "cuda graphs": graphs}]

    def verify(self, made: Any, points: list[Point]) -> None:
        """Dense ours has the logits of transformers, and packed ours those of the reference, as far as rounding goes.

        In bfloat16 a router's ties fall otherwise, layer after layer: another prompt must be twice as far off at least.
        """
        packed = made[1]
        other = logits_of(packed, PROMPT + 1)
        found = {DENSE: logits_of(dense_model(True), PROMPT), PACKED: logits_of(packed, PROMPT)}
        exact = {DENSE: logits_of(dense_model(False), PROMPT)}
        chosen, packed.config._experts_implementation = packed.config._experts_implementation, KEY.format("reference")
        exact[PACKED] = logits_of(packed, PROMPT)
        packed.config._experts_implementation = chosen
        off = {name: float((x - exact[name]).norm() / exact[name].norm()) for name, x in found.items()}
        allowed = float((other - exact[PACKED]).norm() / exact[PACKED].norm()) / 2
        assert all(value < allowed for value in off.values()), (off, allowed)
        points[0]["relative difference of the logits"] = off

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for name, rate in points[0]["tokens/s"].items():
            share = points[0].get("share of read rate", {}).get(name)
            yield {"name": name, "rate": rate, "ratio": points[0]["ratio"][name], "share": share}


@dataclass(frozen=True)
class Loading(Case):
    """Loading the packed model, and what it holds of the GPU."""

    folder: Path
    columns = """
        case   | seconds        | GB of weights  | GB at the peak of loading
        {case} | {seconds:.1f}  | {held!G:.2f}   | {peak!G:.2f}
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        torch.cuda.reset_peak_memory_stats()
        model, seconds = packed_model(self.folder)
        held = sum(parameter.nbytes for parameter in model.parameters())
        return [{"seconds": seconds, "held": held, "peak": torch.cuda.max_memory_allocated()}]

    def verify(self, made: None, points: list[Point]) -> None:
        """The weights are the checkpoint's, and all of them are on the GPU."""
        on_disk = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        assert abs(points[0]["held"] / on_disk - 1) < 0.01, points


@dataclass(frozen=True)
class Throughput(Case):
    """Requests that are all submitted at once to a batcher on the packed model."""

    folder: Path
    number: int
    prompt: int = 256
    new_tokens: int = 128
    columns = """
        case   | new tokens/s  | seconds        | GB of keys and values
        {case} | {rate:.0f}    | {seconds:.2f}  | {pages!G:.2f}
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        model = packed_model(self.folder)[0]
        prompts = [tokens(self.prompt, 200_000, seed) for seed in range(self.number)]
        options: dict[str, Any] = {"eos_token_id": [], "progress": False}
        with closing(ContinuousBatcher(model, max_num_sequences=self.number, share_prefixes=False)) as batcher:
            batcher.generate(prompts, max_new_tokens=4, **options)
            begin = time.perf_counter()
            made_tokens = batcher.generate(prompts, max_new_tokens=self.new_tokens, **options)
            seconds, pages = time.perf_counter() - begin, batcher.stats().kv_bytes
        new = sum(map(len, made_tokens))
        return [{"new tokens": new, "seconds": seconds, "rate": new / seconds, "pages": pages}]

    def verify(self, made: None, points: list[Point]) -> None:
        """Every request got what it asked for."""
        assert points[0]["new tokens"] == self.number * self.new_tokens, points


def cases(settings: Settings, folder: Path) -> list[Case]:
    """All cases."""
    folder = Path(settings.checkpoint) if settings.checkpoint else folder / "20b"
    return [
        Loading("load the packed 20b", folder),
        *(Throughput(f"{number} requests of 256 tokens in, 128 out", folder, number) for number in (16, 64, 256)),
        OneUser("decode, one sequence", folder, decodes=True),
        OneUser("a prompt of 2,048 tokens", folder, decodes=False),
        Machine("machine", {"read GB/s": read_rate}),
    ]


SETTINGS = Settings()
