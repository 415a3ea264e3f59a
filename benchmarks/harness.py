"""What all benchmarks measure with: turns, the machine's own limits, peak memory, and one JSON line per point."""

from __future__ import annotations

import functools
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import gptoss_opt
from gptoss_opt.kernels import memory
from gptoss_opt.kernels.processor import processor

RESULTS = Path(__file__).parent / "results"


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = _read("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = " ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in info)
    return f"{names[0] if names else platform.processor()} ({processor()}), {len(names)} cores, {flags}"


def kind() -> str:
    """The kind of device, for the names of files: "zen-5", "nvidia-h100-80gb-hbm3"."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return name.lower().replace(" ", "-")


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def record(name: str, points: Sequence[Mapping[str, Any]], command: str) -> Path:
    """Write one JSON line per point to results/, each with versions, hardware, commit and command; return the file."""
    common = {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gptoss_opt": gptoss_opt.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": command,
    }
    path = RESULTS / f"{name}-{kind()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({**point, **common}) + "\n" for point in points))
    return path


def seconds(run: Callable[[], object]) -> float:
    """How long one run takes, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time the runs in turn, `repeats` times, after one warm-up each: drifts of the machine hit all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:
                times[name].append(taken)
    return times


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over turns of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


@functools.cache
def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """This machine's matrix product rate, FLOP/s: the median of several, on random data."""
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    times = alternate({"gemm": lambda: a @ b}, 9)["gemm"]
    return 2 * size**3 / statistics.median(times)


@functools.cache
def read_rate() -> float:
    """How fast this machine reads memory, bytes/s: the sum of a gigabyte on huge pages."""
    room = memory.empty((2**27,), torch.int64, device()).zero_()
    return room.numel() * 8 / min(alternate({"read": room.sum}, 5)["read"])


def peak_memory(setup: Callable[..., Callable[[], object]], *args: Any) -> int:
    """Bytes that `setup(*args)()` needs at its peak beyond what was there before, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (setup, args, torch.get_num_threads()))


def _peak(setup: Callable[..., Callable[[], object]], args: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    run = setup(*args)
    if torch.cuda.is_initialized():  # and not only there
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = forget_peak()
    run()
    return resident("VmHWM") - before


def forget_peak() -> int:
    """Make the system forget the most memory that this process had, and return what it has now, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """A field of this process's memory in bytes, such as "VmRSS" (now) or "VmHWM" (the highest so far); Linux."""
    line = next(line for line in _read("/proc/self/status").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
