"""`load` of a packed 20b checkpoint: time, peak memory, and the whole model at work.

Writes a random checkpoint of the released shapes, loads it in processes of their own, and reads its files as plainly as
can be beside that: from the system's cache, and from the disk. With `--full`, all 24 layers (14 GB of disk) are loaded
as well, and generate.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from benchmarks import case
from benchmarks.case import Case, Point
from benchmarks.harness import device, median_ratio, read_rate, resident
from gptoss_opt import load, with_flash_attention, with_mxfp4_experts
from gptoss_opt.kernels import memory
from gptoss_opt.model.experts import PROJECTIONS
from gptoss_opt.testing import SIZES, random_checkpoint

MEMORY_RATIO, TIME_RATIO = 1.15, 1.0
BUFFER = 64 << 20
PROMPT, NEW_TOKENS = 64, 64


@dataclass(frozen=True)
class Settings(case.Settings):
    """What else can be set: how many layers, and whether all 24 of them are loaded and generate as well."""

    layers: int = 4
    full: bool = False


@functools.cache
def checkpoint(folder: Path, layers: int) -> Path:
    """A random checkpoint of the 20b's shapes."""
    return random_checkpoint(folder / f"{layers} layers", "20b", layers=layers, progress=True)


@dataclass(frozen=True)
class OfCheckpoint(Case):
    """What all cases share: a checkpoint of some layers, of which the model must hold every byte."""

    folder: Path
    layers: int

    def setup(self) -> Path:
        return checkpoint(self.folder, self.layers)

    def verify(self, made: Path, points: list[Point]) -> None:
        """The model is as large as the weights; `measured` has seen that its logits are numbers."""
        index = json.loads((made / "model.safetensors.index.json").read_text())
        held = points[0]["model bytes"]
        assert (held["ours"] if isinstance(held, dict) else held) == index["metadata"]["total_size"], points


@dataclass(frozen=True)
class Load(OfCheckpoint):
    """Loading beside reading the files twice, in turn, from the system's cache or from the disk; transformers once."""

    cached: bool
    columns = """
        case   | what   | ours              | beside                       | ratio    | asked
        {case} | {what} | {ours:.2f} {unit} | {theirs:.2f} {unit} {beside} | {ratio}x | <= {asked}x
    """

    def run(self, made: Path, repeats: int) -> list[Point]:
        on_disk = sum(file.stat().st_size for file in made.glob("*.safetensors"))

        def prepare() -> None:
            apart(touch, on_disk * 5 // 4)
            (read if self.cached else out_of_cache)(made)

        def timed(reading: Callable[[Path], None]) -> float:
            prepare()
            begin = time.perf_counter()
            reading(made)
            return time.perf_counter() - begin

        found: list[dict[str, float]] = []
        twice: dict[str, list[float]] = {name: [] for name in READING}
        for _ in range(repeats):
            for name, reading in READING.items():
                twice[name].append(timed(reading) + timed(reading))
            prepare()
            found.append(apart(measured, ours, made, torch.get_num_threads(), False))
        peer = apart(measured, transformers, made, torch.get_num_threads(), False)
        seconds = [one["seconds"] for one in found]
        size, peak = found[0]["model bytes"], max(one["peak bytes"] for one in found)
        point = {
            "seconds": {"ours": round(statistics.median(seconds), 2), "transformers": round(peer["seconds"], 2)},
            "reading twice, seconds": {name: round(statistics.median(taken), 2) for name, taken in twice.items()},
            "time ratio": {name: round(1 / median_ratio(taken, seconds), 2) for name, taken in twice.items()},
            "asked time ratio": TIME_RATIO,
            "model bytes": {"ours": size, "transformers": peer["model bytes"]},
            "peak bytes": {"ours": peak, "transformers": peer["peak bytes"]},
            "memory ratio": round(peak / size, 3),
            "asked memory ratio": MEMORY_RATIO,
        }
        return [point]

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        point = points[0]
        for name, ratio in point["time ratio"].items():
            times = {"ours": point["seconds"]["ours"], "theirs": point["reading twice, seconds"][name], "unit": "s"}
            yield {"what": "time", "beside": f"read twice {name}", "ratio": ratio, "asked": TIME_RATIO, **times}
        sizes = {"ours": point["peak bytes"]["ours"] / 1e9, "theirs": point["model bytes"]["ours"] / 1e9, "unit": "GB"}
        asked = {"ratio": point["memory ratio"], "asked": MEMORY_RATIO}
        yield {"what": "peak memory", "beside": "finished", **sizes, **asked}


@dataclass(frozen=True)
class Generate(OfCheckpoint):
    """The whole model, loaded and generating, once; on a GPU also as transformers has it, which takes 42 GB."""

    columns = """
        case   | loaded in   | decode tokens/s   | prefill tokens/s   | peak
        {case} | {seconds} s | {decode tokens/s} | {prefill tokens/s} | {peak bytes of the process!G:.2f} GB
    """

    def run(self, made: Path, repeats: int) -> list[Point]:
        found = apart(measured, ours, made, torch.get_num_threads(), True)
        on_gpu = device().type == "cuda"
        peer = apart(measured, transformers, made, torch.get_num_threads(), True) if on_gpu else {}
        point = {
            "prompt": PROMPT,
            "new tokens": NEW_TOKENS,
            **{name: round(value, 2) for name, value in found.items()},
            "memory ratio": round(found["peak bytes"] / found["model bytes"], 3),
            "share of read rate": round(found["decode bytes/s"] / read_rate(), 3),
            "peer": {name: round(value, 2) for name, value in peer.items()},
        }
        return [point]


def read(folder: Path) -> None:
    """Read all weights of a checkpoint into memory, file by file, in the plainest way."""
    for file in sorted(folder.glob("*.safetensors")):
        file.read_bytes()


def read_over(folder: Path) -> None:
    """Read all weights of a checkpoint into one buffer, over and over: nothing of them is kept."""
    buffer = memoryview(bytearray(BUFFER))
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


# What loading is held to, twice each: the first keeps the bytes, as a model does, and the second does not.
READING = {"into memory": read, "into one buffer": read_over}


def out_of_cache(folder: Path) -> None:
    """Make the system forget what it holds of a checkpoint (Linux)."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as source:
            os.fsync(source.fileno())
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(num_bytes: int) -> None:
    """Use memory once, in huge pages: what a virtual machine's host has yet to give comes many times slower."""
    memory.empty((num_bytes,), torch.uint8).fill_(1)


def ours(folder: Path) -> Any:
    """The model with packed experts."""
    return load(folder, with_mxfp4_experts(), with_flash_attention(), device=device())


def transformers(folder: Path) -> Any:
    """The model as transformers loads it: dequantised."""
    model: Any = GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval().to(device())


def measured(loading: Callable[[Path], Any], folder: Path, threads: int, generates: bool) -> dict[str, float]:
    """Seconds, bytes of the finished model, and the peak of resident memory above what was there before, in bytes."""
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    begin = time.perf_counter()
    model = loading(folder)
    taken = time.perf_counter() - begin
    size = sum(parameter.nbytes for parameter in model.parameters())
    found = {"seconds": taken, "model bytes": size, "peak bytes": resident("VmHWM") - before}
    tokens = torch.randint(2, model.config.vocab_size, (1, PROMPT)).to(model.device)
    with torch.no_grad():
        finite = bool(model(tokens).logits.isfinite().all())
    assert finite, f"{loading.__name__}: the logits of the loaded model are not finite"
    return found | (generation(model, tokens) if generates else {})


def generation(model: Any, tokens: Tensor) -> dict[str, float]:
    """Tokens/s of prefill and of decoding one sequence, and the peak of resident memory with all of it, in bytes."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def timed(count: int) -> float:
        begin = time.perf_counter()
        out = model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **options)
        assert out.shape[1] == PROMPT + count
        return time.perf_counter() - begin

    timed(1)
    one = statistics.median(timed(1) for _ in range(3))
    rest = timed(1 + NEW_TOKENS) - one
    return {
        "prefill tokens/s": PROMPT / one,
        "decode tokens/s": NEW_TOKENS / rest,
        "decode bytes/s": bytes_per_token(model) * NEW_TOKENS / rest,
        "peak bytes of the process": float(resident("VmHWM")),
    }


def bytes_per_token(model: Any) -> float:
    """Bytes of weights read for one token: all but the embedding, and of the experts those that are routed to."""
    experts = {f"{projection}{suffix}" for projection in PROJECTIONS for suffix in ("", "_blocks", "_scales")}
    routed = model.config.num_experts_per_tok / model.config.num_local_experts
    read = {name: parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens" not in name}
    return float(sum(size * (routed if name.split(".")[-1] in experts else 1) for name, size in read.items()))


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Some layers from the cache and from the disk, and all of them if that is asked for."""
    some, every = settings.layers, SIZES["20b"].layers
    found: list[Case] = [
        Load(f"load, 20b shape, {some} layers, from the cache", folder, some, cached=True),
        Load(f"load, 20b shape, {some} layers, from the disk", folder, some, cached=False),
    ]
    return found + [Generate(f"load and generate, 20b shape, {every} layers", folder, every)] * settings.full


SETTINGS = Settings()
