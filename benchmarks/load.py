"""`load` of a packed 20b checkpoint: time, peak memory, and the whole model at work.

    python -m benchmarks.load [--layers N] [--repeats N] [--full]

Writes a random checkpoint of the released shapes, loads it in processes of their own, and reads its files as plainly as
can be beside that: from the system's cache, and from the disk. `--full` takes all 24 layers (14 GB of disk) and
generates with them as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssForCausalLM

from benchmarks.harness import device, median_ratio, read_rate, record, resident, table
from gptoss_opt import load, with_flash_attention, with_mxfp4_experts
from gptoss_opt.kernels import memory
from gptoss_opt.model.experts import PROJECTIONS
from gptoss_opt.testing import SIZES, random_checkpoint

MEMORY_RATIO, TIME_RATIO = 1.15, 1.0
BUFFER = 64 << 20
CACHED = (True, False)
PROMPT, NEW_TOKENS = 64, 64


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


def ours(folder: Path) -> GptOssForCausalLM:
    """The model with packed experts."""
    return load(folder, with_mxfp4_experts(), with_flash_attention(), device=device())


def transformers(folder: Path) -> GptOssForCausalLM:
    """The model as transformers loads it: dequantised."""
    return GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device())


def measured(how: Callable[[Path], GptOssForCausalLM], folder: Path, threads: int, generate: bool) -> dict[str, float]:
    """Seconds, bytes of the finished model, and the peak of resident memory above what was there before, in bytes."""
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    begin = time.perf_counter()
    model = how(folder)
    taken = time.perf_counter() - begin
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {"seconds": taken, "model bytes": parameters, "peak bytes": resident("VmHWM") - before}
    tokens = torch.randint(2, 199998, (1, PROMPT))
    with torch.no_grad():
        if not bool(model(tokens.to(model.device)).logits.isfinite().all()):
            raise AssertionError(f"{how.__name__}: the logits of the loaded model are not finite")
    return found | (_generation(model, tokens) if generate else {})


def _generation(model: GptOssForCausalLM, tokens: torch.Tensor) -> dict[str, float]:
    """Tokens/s of prefill and of decoding one sequence, and the peak of resident memory with all of it, in bytes."""
    tokens = tokens.to(model.device)
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
        "decode bytes/s": _bytes_per_token(model) * NEW_TOKENS / rest,
        "peak bytes of the process": float(resident("VmHWM")),
    }


def _bytes_per_token(model: GptOssForCausalLM) -> float:
    """Bytes of weights read for one token: all but the embedding, and of the experts those that are routed to."""
    experts = {f"{projection}{suffix}" for projection in PROJECTIONS for suffix in ("", "_blocks", "_scales")}
    routed = model.config.num_experts_per_tok / model.config.num_local_experts
    return sum(
        parameter.numel() * parameter.element_size() * (routed if name.split(".")[-1] in experts else 1)
        for name, parameter in model.named_parameters()
        if "embed_tokens" not in name
    )


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def loading_point(folder: Path, layers: int, repeats: int, threads: int, cached: bool) -> dict[str, Any]:
    """Loading beside reading, in turn."""
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def prepare() -> None:
        apart(touch, on_disk * 5 // 4)
        (read if cached else out_of_cache)(folder)

    def timed(reading: Callable[[Path], None]) -> float:
        prepare()
        begin = time.perf_counter()
        reading(folder)
        return time.perf_counter() - begin

    found: list[dict[str, float]] = []
    twice: dict[str, list[float]] = {name: [] for name in READING}
    for _ in range(repeats):
        for name, reading in READING.items():
            twice[name].append(timed(reading) + timed(reading))
        prepare()
        found.append(apart(measured, ours, folder, threads, False))
    peer = apart(measured, transformers, folder, threads, False)
    seconds = [one["seconds"] for one in found]
    size = found[0]["model bytes"]
    return {
        "case": f"load, 20b shape, {layers} layers, from the {'cache' if cached else 'disk'}",
        "seconds": {"ours": round(statistics.median(seconds), 2), "transformers": round(peer["seconds"], 2)},
        "reading twice, seconds": {name: round(statistics.median(taken), 2) for name, taken in twice.items()},
        "time ratio": {name: round(1 / median_ratio(taken, seconds), 2) for name, taken in twice.items()},
        "asked time ratio": TIME_RATIO,
        "model bytes": {"ours": size, "transformers": peer["model bytes"]},
        "peak bytes": {"ours": max(one["peak bytes"] for one in found), "transformers": peer["peak bytes"]},
        "memory ratio": round(max(one["peak bytes"] for one in found) / size, 3),
        "asked memory ratio": MEMORY_RATIO,
    }


def full_point(folder: Path, threads: int) -> dict[str, Any]:
    """The whole model, loaded and generating; on a GPU also as transformers has it, which takes 42 GB."""
    found = apart(measured, ours, folder, threads, True)
    peer = apart(measured, transformers, folder, threads, True) if device().type == "cuda" else {}
    return {
        "case": f"load and generate, 20b shape, {SIZES['20b'].layers} layers",
        "prompt": PROMPT,
        "new tokens": NEW_TOKENS,
        **{name: round(value, 2) for name, value in found.items()},
        "memory ratio": round(found["peak bytes"] / found["model bytes"], 3),
        "share of read rate": round(found["decode bytes/s"] / read_rate(), 3),
        "peer": {name: round(value, 2) for name, value in peer.items()},
    }


def show(points: list[dict[str, Any]]) -> str:
    """The points as a table."""
    rows = []
    for point in points:
        if "time ratio" in point:
            sizes = point["peak bytes"]
            for name, ratio in point["time ratio"].items():
                times = f"{point['seconds']['ours']} s", f"{point['reading twice, seconds'][name]} s read twice {name}"
                rows.append((point["case"], "time", *times, f"{ratio}x", f"<= {TIME_RATIO}x"))
            rows.append(
                (
                    point["case"],
                    "peak memory",
                    f"{sizes['ours'] / 1e9:.2f} GB",
                    f"{point['model bytes']['ours'] / 1e9:.2f} GB finished",
                    f"{point['memory ratio']}x",
                    f"<= {MEMORY_RATIO}x",
                )
            )
        else:
            speed = f"decode {point['decode tokens/s']} tokens/s, prefill {point['prefill tokens/s']} tokens/s"
            peak = f"{point['peak bytes of the process'] / 1e9:.2f} GB"
            rows.append((point["case"], speed, f"loaded in {point['seconds']} s", f"peak {peak}", "", ""))
    return table(("case", "what", "ours", "beside", "ratio", "asked"), rows)


def main() -> None:
    """Write the checkpoint, run the cases, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="all 24 layers, and generate")
    parser.add_argument("--folder", help="where to write the checkpoints; a temporary folder if left out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = random_checkpoint(Path(temporary) / "some", "20b", layers=options.layers, progress=True)
        points = [loading_point(folder, options.layers, options.repeats, options.threads, cached) for cached in CACHED]
        if options.full:
            folder = random_checkpoint(Path(temporary) / "all", "20b", progress=True)
            points.append(full_point(folder, options.threads))
    print(show(points))
    command = (
        f"python -m benchmarks.load --layers {options.layers} --repeats {options.repeats}{' --full' * options.full}"
    )
    print(f"written: {record('load', points, command)}")


if __name__ == "__main__":
    main()
