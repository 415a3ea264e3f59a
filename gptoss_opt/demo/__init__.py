"""The demo: GPT-OSS in eager attention and with the wrappers, measured and compared.

Generation and a training step over long prompts; decoding with the experts held in each way; the model sharded over
several processes, if they are asked for; and several prompts at once: a table of each. The models are measured in
processes of their own, so that the memory of each is its own. Timed once, after a short warm-up.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from ..core import explain
from ..testing import SIZES, Size, _write, random_checkpoint
from ..wrappers.fast_experts import with_fast_experts
from ..wrappers.flash_attention import with_flash_attention
from ..wrappers.mxfp4_experts import with_mxfp4_experts
from .decode import PROMPT, Decoder
from .measure import Subject, Wrap
from .report import DecodeResult, Report, Result, ServedResult, ShardedResult
from .serving import LENGTHS, NUM_PROMPTS, Server
from .sharded import SHARDED_ROWS, measure_sharded


@dataclass(frozen=True)
class Row:
    """One stack of the table: its label, and what puts it on a model (None: the model as transformers loads it)."""

    label: str
    wrap: Wrap | None = None


# The others are compared with the first. A new wrapper adds one row.
ROWS = (
    Row("eager (transformers)"),
    Row("with_flash_attention", with_flash_attention),
)

# The same for the second table, whose wrappers are given to `load`.
DECODE_ROWS = (
    Row("dense (transformers)"),
    Row("with_fast_experts", with_fast_experts),
    Row("with_mxfp4_experts", with_mxfp4_experts),
)


@dataclass(frozen=True)
class ServeRow(Row):
    """The same for the table of several prompts: by a `ContinuousBatcher`, or by `generate`."""

    batcher: bool = True


# Those that follow each other with the same wrapper share a process, and the model.
SERVE_ROWS = (
    ServeRow("generate, one batch (transformers)", batcher=False),
    ServeRow("ContinuousBatcher"),
    ServeRow("ContinuousBatcher, with_mxfp4_experts", with_mxfp4_experts),
)

WIDE = replace(SIZES["20b"], layers=1, experts=8, vocab=4096, bos=4093, pad=4094, eos=4095)
"""One layer as wide as those of gpt-oss-20b, with 8 of its 32 experts: a token reads as much as there."""

CODE = """\
from gptoss_opt import load, with_flash_attention, with_mxfp4_experts
model = load("{model}", with_mxfp4_experts(), with_flash_attention())"""


class DemoError(Exception):
    """The demo cannot run; the message is one sentence for the user."""


def check_model(path: str, longest: int) -> None:
    """Raise `DemoError` if this is not the folder or hub id of a GPT-OSS model that takes so many tokens."""
    if Path(path).is_file():
        raise DemoError(f"{path!r} is a file: give the folder that it is in.")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DemoError(
            f"cannot read the config of {path!r}: it is neither a folder with a config.json that transformers knows, "
            "nor a model that the Hugging Face hub gives us; check the name and the connection."
        ) from error
    if config.model_type != "gpt_oss":
        raise DemoError(f"{path!r} is a {config.model_type} model, and the demo takes gpt_oss models only.")
    if longest > config.max_position_embeddings:
        raise DemoError(f"{path!r} takes {config.max_position_embeddings} tokens at most, not {longest}.")


def packed(path: str) -> bool:
    """Whether the experts of this checkpoint are packed."""
    return getattr(AutoConfig.from_pretrained(path), "quantization_config", None) is not None


# One per measuring process: a model stays where it is, and only file names and numbers travel.
_subject: Subject | None = None
_server: Server | None = None
_serving: Iterator[float | ServedResult] = iter(())


def _load(*args: Any) -> str:
    global _subject
    _subject = Subject(*args)
    return str(explain(_subject.model))


def _measure(*args: Any) -> Result:
    assert _subject is not None
    return _subject.measure(*args)


def _decode(new_tokens: int, file: Path, *args: Any) -> tuple[DecodeResult, str]:
    decoder = Decoder(*args)
    return decoder.measure(new_tokens, file), str(explain(decoder.model))


def _load_server(*args: Any) -> None:
    global _server
    _server = Server(*args)


def _begin_to_serve(*args: Any) -> None:
    global _serving
    assert _server is not None
    _serving = _server.measure(*args)


def _go_on_serving() -> float | ServedResult:
    return next(_serving)


def _quiet() -> None:
    # Progress bars within the demo's own; errors come back as exceptions.
    sys.stderr = io.StringIO()
    untyped: Any = transformers_logging
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()


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


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Say in one sentence what a user can run into while a model is loaded and run."""
    try:
        yield
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise DemoError(f"cannot load or run {path!r}: {' '.join(str(error).split())}") from error
    except (MemoryError, RuntimeError) as error:
        known = (MemoryError, torch.OutOfMemoryError, BrokenProcessPool)
        # A batcher says it in words of its own.
        if isinstance(error, known) or any(name in str(error) for name in ("DefaultCPUAllocator", "OutOfMemoryError")):
            raise DemoError("out of memory, or killed: use shorter --lengths or a smaller model.") from error
        raise


def run_demo(
    model: str | None = None,
    *,
    lengths: Sequence[int] = (1024, 2048),
    new_tokens: int = 16,
    dtype: str | None = None,
    threads: int | None = None,
    size: str = "small",
    wide: Size | None = WIDE,
    rows: Sequence[Row] = ROWS,
    decode_rows: Sequence[Row] = DECODE_ROWS,
    serve_rows: Sequence[ServeRow] = SERVE_ROWS,
    isolated: bool = True,
    ranks: int | None = None,
) -> Report:
    """Generate and train a step with every stack, decode with the experts held in each way, serve, and compare.

    Args:
        model: a folder or a hub id; None writes random checkpoints and removes them afterwards.
        lengths: prompt lengths in tokens.
        new_tokens: how many tokens to generate, greedily.
        dtype: to load the weights in; None is "float32" for the random checkpoint, else "auto", the dtype of the file.
            The tables of decoding and serving are in float32 if that is asked for, else in bfloat16.
        threads: CPU threads; None leaves that to torch.
        size: of the random checkpoint.
        wide: the size of the random checkpoint for decoding and serving; None takes the first one again.
        rows: the stacks.
        decode_rows: the ways to hold the experts.
        serve_rows: the ways to complete several prompts at once.
        isolated: measure each stack in a process of its own. Without, memory is less exact.
        ranks: shard the model over so many processes too, in float32 unless another dtype is asked for.

    Raises:
        DemoError: the model cannot be loaded, is not a GPT-OSS model, does not fit into memory, or does not divide over
            the ranks.

    Example:
        >>> report = run_demo(size="tiny", wide=None, lengths=[16], new_tokens=2, isolated=False)
        >>> report.problems
        ()
    """
    if not lengths or not rows:
        raise ValueError("the demo needs at least one length and one row.")
    # In growing order, so that memory the allocator keeps from a shorter run never exceeds the peak of a longer one.
    lengths = sorted(set(lengths))
    decode_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    dtype = dtype or ("auto" if model else "float32")
    with tempfile.TemporaryDirectory(prefix="gptoss_opt-demo-") as scratch:
        path = model or str(random_checkpoint(Path(scratch, "checkpoint"), size))
        check_model(path, lengths[-1])
        check_ranks(path, ranks)
        if not packed(path):
            # To pack dense weights is lossy: there is no first row to hold it to.
            decode_rows = [row for row in decode_rows if row.wrap is not with_mxfp4_experts]
            serve_rows = [row for row in serve_rows if row.wrap is not with_mxfp4_experts]
        sharded_rows = ((None, None), *SHARDED_ROWS) if ranks else ()
        sharded: list[ShardedResult] = []
        results: list[Result] = []
        decoded: list[DecodeResult] = []
        served: list[ServedResult] = []
        explanations = ["", ""]
        bar_format = "{desc:<53}{bar}| {n_fmt}/{total_fmt} {elapsed}"
        total = len(rows) * (1 + len(lengths)) + len(decode_rows) + len(sharded_rows) + len(serve_rows)
        with tqdm(total=total, bar_format=bar_format, ncols=80) as bar:
            for row in rows:
                with _explained(path), _caller(isolated) as call:
                    bar.set_description_str(f"{row.label}: load")
                    explanations[0] = call(_load, path, dtype, row.label, row.wrap, threads)
                    bar.update()
                    for length in lengths:
                        bar.set_description_str(f"{row.label}: length {length}")
                        results.append(call(_measure, length, new_tokens, Path(scratch, f"first-{length}.pt")))
                        bar.update()
            for label, wrap in sharded_rows:
                bar.set_description_str(f"{label or 'one process'}: decode")
                with _explained(path), _caller(isolated=False) as call:
                    first = Path(scratch, "one.pt"), path, sharded_dtype(dtype), threads, new_tokens
                    sharded.append(call(measure_sharded, ranks, label, wrap, *first))
                    bar.update()
            if (decode_rows or serve_rows) and model is None and wide is not None:
                path = str(_wide_checkpoint(Path(scratch, "wide"), wide))
            for row in decode_rows:
                with _explained(path), _caller(isolated) as call:
                    bar.set_description_str(f"{row.label}: decode")
                    arguments = (path, decode_dtype, row.label, row.wrap, threads)
                    result, explanations[1] = call(_decode, new_tokens, Path(scratch, "first.pt"), *arguments)
                    decoded.append(result)
                    bar.update()
            for wrap, group in groupby(serve_rows, lambda row: row.wrap):
                with _explained(path), _caller(isolated) as call:
                    bar.set_description_str("serve: load")
                    call(_load_server, path, decode_dtype, wrap, threads)
                    for serve_row in group:
                        bar.set_description_str(f"{serve_row.label}: start")
                        call(
                            _begin_to_serve, serve_row.label, serve_row.batcher, new_tokens, Path(scratch, "served.pt")
                        )
                        while not isinstance(found := call(_go_on_serving), ServedResult):
                            bar.set_description_str(f"{serve_row.label}: {found:.0f} tokens/s")
                        served.append(found)
                        bar.update()
    name = model or f"random checkpoint, size {size!r}"
    decode_name = model or ("one layer as wide as gpt-oss-20b's, 8 experts" if wide is WIDE else name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return Report(
        f"{name}, dtype {dtype}, {new_tokens} new tokens, on {device} ({threads or torch.get_num_threads()} threads)",
        tuple(sorted(results, key=lambda result: result.length)),
        f"{decode_name}, dtype {str(decode_dtype).removeprefix('torch.')}, {new_tokens} tokens after {PROMPT}",
        tuple(decoded),
        "\n\n".join(filter(None, explanations)),
        CODE.format(model=model or "openai/gpt-oss-20b"),
        f"{name}, dtype {str(sharded_dtype(dtype)).removeprefix('torch.')}, {new_tokens} tokens after {PROMPT}",
        tuple(sharded),
        f"{decode_name}, dtype {str(decode_dtype).removeprefix('torch.')}, {NUM_PROMPTS} prompts of {LENGTHS[0]} to "
        f"{LENGTHS[1]} tokens",
        tuple(served),
    )


def sharded_dtype(dtype: str) -> torch.dtype:
    """The dtype of the table of sharded models."""
    return torch.bfloat16 if dtype in ("bfloat16", "float16") else torch.float32


def check_ranks(path: str, ranks: int | None) -> None:
    """Raise `DemoError` if this model does not divide over so many processes."""
    heads = AutoConfig.from_pretrained(path).num_key_value_heads
    if ranks and heads % ranks:
        raise DemoError(f"the {heads} key/value heads of {path!r} do not divide over {ranks} ranks.")


def _wide_checkpoint(folder: Path, size: Size) -> Path:
    folder.mkdir()
    _write(folder, size, size.layers, seed=0, progress=False)
    return folder
