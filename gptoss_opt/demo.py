"""The demo: one GPT-OSS checkpoint in eager attention and in each wrapper, measured and compared.

Each stack is measured in a process of its own, so that its memory is its own. Timed once, after a short warm-up.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .core import explain
from .testing import random_checkpoint
from .wrappers.flash_attention import with_flash_attention

LENGTHS = (512, 2048)
NEW_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One stack of the table: its label, and what puts it on a model (None: the model as transformers loads it)."""

    label: str
    wrap: Callable[[Any], Any] | None = None


# The first row is what the others are compared with. A new wrapper adds one row.
ROWS = (
    Row("eager (transformers)"),
    Row("with_flash_attention", with_flash_attention),
)


@dataclass(frozen=True)
class Tolerance:
    """How far a stack may be from the first row. None and False: shown, but not judged.

    `largest`: max |difference| / max |logit|. `median`: over positions, of |difference| / |logits|.
    """

    largest: float | None
    median: float
    sinks: float | None
    tokens: bool


# In 16 bits, rounding sends a token with nearly equal router scores to another expert, in eager as well. Such a token
# has other logits, so neither the largest difference nor the greedy tokens can be held to a bound; the median can.
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-5, 1e-3, True),
    torch.bfloat16: Tolerance(None, 0.1, None, False),
    torch.float16: Tolerance(None, 0.02, None, False),
}


class DemoError(Exception):
    """The demo cannot run; the message is one sentence for the user."""


@dataclass(frozen=True)
class Measured:
    """What a process says about one stack at one length. `file` holds tokens [N], logits [T, V] and sinks [L * H]."""

    file: Path
    generate_seconds: float
    train_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Result:
    """One line of the table: a stack at a length, against the first row at that length.

    Attributes:
        same_tokens: how many greedy tokens are the same before the first that differs.
        logit_difference: the largest absolute one, over all positions.
        sink_difference: |difference| / |gradient| of all sinks; None if they take no gradient.
        peak_bytes: memory beyond the loaded model, at its peak; None where it cannot be measured.
        problems: what is beyond the tolerance, as sentences.
    """

    stack: str
    length: int
    new_tokens: int
    same_tokens: int
    logit_difference: float
    sink_difference: float | None
    generate_seconds: float
    train_seconds: float
    peak_bytes: int | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All results, and what prints below them. `str` is the whole text."""

    title: str
    results: tuple[Result, ...]
    explanation: str
    code: str

    @property
    def problems(self) -> tuple[str, ...]:
        """What is beyond the tolerance, in all rows; empty if every stack gave the same model."""
        return tuple(problem for result in self.results for problem in result.problems)

    def __str__(self) -> str:
        verdict = "\n".join(f"NOT THE SAME: {problem}" for problem in self.problems)
        parts = (self.title, _table(self.results), FOOTNOTE, verdict, self.explanation, self.code)
        return "\n\n".join(part for part in parts if part)


class Subject:
    """The model that a measuring process holds, and what is done to it."""

    def __init__(self, path: str, dtype: torch.dtype | str, row: Row, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.model: Any = load_eager(path, dtype)
        if row.wrap is not None:
            self.model = row.wrap(self.model)
        self.memory = PeakMemory(self.model.device)
        self.generate(self.prompt(16), 2)
        self.train_step(self.prompt(16))

    def prompt(self, length: int) -> Tensor:
        """Random token ids [1, length], the same for every stack."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (1, length), generator=generator).to(self.model.device)

    def generate(self, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        """The greedy tokens [new_tokens], and the seconds they took."""
        count: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        start = self._now()
        tokens = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **count)
        return tokens[0, prompt.shape[1] :], self._now() - start

    def train_step(self, prompt: Tensor) -> tuple[Tensor, Tensor, float]:
        """Forward with labels, and backward: logits [T, V], gradients of all sinks, and the seconds they took."""
        self.model.train()
        start = self._now()
        out = self.model(input_ids=prompt, labels=prompt, use_cache=False)
        out.loss.backward()
        seconds = self._now() - start
        sinks = [param.grad for name, param in self.model.named_parameters() if name.endswith(".sinks")]
        gradients = torch.cat([grad.flatten() for grad in sinks if grad is not None] or [torch.empty(0)])
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        return out.logits[0].detach(), gradients, seconds

    def measure(self, length: int, new_tokens: int, file: Path) -> Measured:
        """Generate and take one training step at this length; results go to `file`."""
        self.memory.reset()
        tokens, generate_seconds = self.generate(self.prompt(length), new_tokens)
        logits, sinks, train_seconds = self.train_step(self.prompt(length))
        peak = self.memory.peak()
        tensors = {"tokens": tokens, "logits": logits, "sinks": sinks}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)
        return Measured(file, generate_seconds, train_seconds, peak)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class PeakMemory:
    """Peak memory beyond what is held now: torch's own count on CUDA, resident memory of the process on Linux.

    The kernel keeps the peak of resident memory, so no short one is missed; writing 5 to clear_refs resets it.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.cuda = device.type == "cuda"
        self.held = torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.held = None

    def peak(self) -> int | None:
        """Bytes at the peak since `reset`, less those held at first; None where the system does not tell."""
        if self.held is None:
            return None
        highest = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return None if highest is None else max(highest - self.held, 0)


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def load_eager(path: str, dtype: torch.dtype | str) -> nn.Module:
    """The model as transformers loads it, in eager attention and with weights that can be trained."""
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if getattr(AutoConfig.from_pretrained(path), "quantization_config", None):
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    return AutoModelForCausalLM.from_pretrained(path, **options)


def check_model(path: str, lengths: Sequence[int]) -> None:
    """Raise `DemoError` if this is not the folder or hub id of a GPT-OSS model that takes such lengths."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DemoError(
            f"cannot read the config of {path!r}: it is neither a folder with a config.json that transformers knows, "
            "nor a model that the Hugging Face hub gives us; check the name and the connection."
        ) from error
    if config.model_type != "gpt_oss":
        raise DemoError(f"{path!r} is a {config.model_type} model, and the demo takes gpt_oss models only.")
    if (most := config.max_position_embeddings) < max(lengths):
        raise DemoError(f"{path!r} takes up to {most} tokens, so leave out --lengths {max(lengths)}.")


# One per measuring process: a model stays where it is, and only file names and numbers travel.
_subject: Subject | None = None


def _load(*args: Any) -> tuple[torch.dtype, str]:
    global _subject
    _subject = Subject(*args)
    return _subject.model.dtype, str(explain(_subject.model))


def _measure(*args: Any) -> Measured:
    assert _subject is not None
    return _subject.measure(*args)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _caller(isolated: bool) -> Iterator[Callable[..., Any]]:
    """`call(function, *args)`: all calls run in one new process, or here."""
    if not isolated:
        yield lambda function, *args: function(*args)
        return
    # Not forked: a copy of a process that has used torch's threads, or CUDA, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def run_demo(
    model: str | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    new_tokens: int = NEW_TOKENS,
    dtype: torch.dtype | str | None = None,
    threads: int | None = None,
    size: str = "small",
    rows: Sequence[Row] = ROWS,
    isolated: bool = True,
) -> Report:
    """Generate and train one step with every stack at every length, and compare with the first stack.

    Args:
        model: a folder or a hub id; None writes a random checkpoint and removes it afterwards.
        lengths: prompt lengths in tokens.
        new_tokens: how many tokens to generate, greedily.
        dtype: what to load the weights in; None is float32 for the random checkpoint, else the dtype of the file.
        threads: CPU threads; None leaves that to torch.
        size: of the random checkpoint.
        rows: the stacks.
        isolated: measure each stack in a process of its own. Without, memory is less exact.

    Raises:
        DemoError: the model cannot be loaded, is not a GPT-OSS model, or does not fit into memory.

    Example:
        >>> report = run_demo(size="tiny", lengths=[16], new_tokens=2, isolated=False)
        >>> report.problems
        ()
    """
    # In growing order, so that memory the allocator keeps from a shorter run never exceeds the peak of a longer one.
    lengths = sorted(set(lengths))
    with tempfile.TemporaryDirectory(prefix="gptoss_opt-demo-") as scratch:
        path = model or str(random_checkpoint(Path(scratch, "checkpoint"), size))
        check_model(path, lengths)
        dtype = dtype or ("auto" if model else torch.float32)
        results: dict[int, list[Result]] = {length: [] for length in lengths}
        baseline: dict[int, Measured] = {}
        explanation = ""
        with tqdm(
            total=len(rows) * (1 + len(lengths)), bar_format="{desc:<45}{bar}| {n_fmt}/{total_fmt} {elapsed}"
        ) as bar:
            for row in rows:
                with _explained(path), _caller(isolated) as call:
                    bar.set_description(f"{row.label}: load")
                    loaded, explanation = call(_load, path, dtype, row, threads)
                    bar.update()
                    for length in lengths:
                        bar.set_description(f"{row.label}: length {length}")
                        file = Path(scratch, f"{rows.index(row)}-{length}.safetensors")
                        measured = call(_measure, length, new_tokens, file)
                        reference = baseline.setdefault(length, measured)
                        results[length].append(compare(row.label, length, reference, measured, TOLERANCES[loaded]))
                        bar.update()
    name = model or f"a random checkpoint of size {size!r}"
    device = "GPU" if torch.cuda.is_available() else f"CPU, {threads or torch.get_num_threads()} threads"
    return Report(
        f"{name}, {str(loaded).removeprefix('torch.')}, {device}, {new_tokens} new tokens",
        tuple(result for group in results.values() for result in group),
        explanation,
        CODE.format(name=rows[-1].label, model=model or "openai/gpt-oss-20b"),
    )


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Say in one sentence what a user can run into while a model is loaded and run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DemoError(f"cannot load {path!r}: {' '.join(str(error).split())}") from error
    except (MemoryError, RuntimeError) as error:
        known = (MemoryError, torch.OutOfMemoryError, BrokenProcessPool)
        if isinstance(error, known) or "DefaultCPUAllocator" in str(error):
            raise DemoError("out of memory, or killed: use shorter --lengths or a smaller model.") from error
        raise


def compare(label: str, length: int, reference: Measured, measured: Measured, tolerance: Tolerance) -> Result:
    """Hold one measurement to that of the first row."""
    expected, got = load_file(reference.file), load_file(measured.file)
    same = expected["tokens"] == got["tokens"]
    same_tokens = int(same.cumprod(0).sum())
    largest, highest, relative = 0.0, 0.0, []
    # In pieces, as float32 copies of all logits of a large model would fill the memory.
    for want, have in zip(expected["logits"].split(256), got["logits"].split(256), strict=True):
        difference = have.float() - want.float()
        largest = max(largest, difference.abs().max().item())
        highest = max(highest, want.abs().max().item())
        relative.append(difference.norm(dim=-1) / want.float().norm(dim=-1))
    median = torch.cat(relative).median().item()
    sinks = None
    if got["sinks"].numel():
        sinks = ((got["sinks"] - expected["sinks"]).float().norm() / expected["sinks"].float().norm()).item()
    return Result(
        label,
        length,
        len(same),
        same_tokens,
        largest,
        sinks,
        measured.generate_seconds,
        measured.train_seconds,
        measured.peak_bytes,
        tuple(
            f"{label} at length {length}: {problem}"
            for problem in _problems(tolerance, same_tokens < len(same), largest / highest, median, sinks)
        ),
    )


def _problems(
    tolerance: Tolerance, tokens_differ: bool, largest: float, median: float, sinks: float | None
) -> Iterator[str]:
    if tolerance.tokens and tokens_differ:
        yield "the greedy tokens differ."
    # Written so that a NaN is a problem.
    if tolerance.largest is not None and not largest <= tolerance.largest:
        yield f"the largest logit difference is {largest:.1e} of the largest logit, above {tolerance.largest:.0e}."
    if not median <= tolerance.median:
        yield f"the median logit difference is {median:.1e} of the logits, above {tolerance.median:.0e}."
    if tolerance.sinks is not None and sinks is not None and not sinks <= tolerance.sinks:
        yield f"the sink gradients differ by {sinks:.1e}, above {tolerance.sinks:.0e}."


HEADINGS = (
    "length",
    "stack",
    "same greedy tokens",
    "max logit diff",
    "sink grad diff",
    "generate",
    "train step",
    "peak memory",
)
FOOTNOTE = """\
Differences and (ratios) are to the first row of each length; the sink gradient difference is relative.
Train step: forward with labels, and backward. Peak memory: the most that generating and training took beyond the
loaded model (on CUDA as torch counts it, on Linux the resident memory of the process; n/a elsewhere)."""
CODE = """\
from transformers import AutoModelForCausalLM
from gptoss_opt import {name}
model = {name}(AutoModelForCausalLM.from_pretrained("{model}"))"""


def _table(results: Sequence[Result]) -> str:
    first: dict[int, Result] = {}
    lines = [HEADINGS, *(_cells(result, first.setdefault(result.length, result)) for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def _cells(result: Result, first: Result) -> tuple[str, ...]:
    timings = (
        f"{result.generate_seconds:.2f} s{_ratio(first.generate_seconds, result.generate_seconds)}",
        f"{result.train_seconds:.2f} s{_ratio(first.train_seconds, result.train_seconds)}",
        "n/a"
        if result.peak_bytes is None
        else f"{result.peak_bytes / 2**20:.0f} MiB{_ratio(first.peak_bytes, result.peak_bytes)}",
    )
    if result is first:
        return (str(result.length), result.stack, "-", "-", "-", *timings)
    same = "yes" if result.same_tokens == result.new_tokens else f"first {result.same_tokens} of {result.new_tokens}"
    sinks = "no gradient" if result.sink_difference is None else f"{result.sink_difference:.1e}"
    return (str(result.length), result.stack, same, f"{result.logit_difference:.1e}", sinks, *timings)


def _ratio(first: float | None, this: float) -> str:
    return f" ({first / this:.1f}x)" if first and this and first != this else ""
