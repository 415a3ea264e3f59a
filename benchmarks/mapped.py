"""A packed 20b checkpoint that is read, and one that is mapped: time to the first token, memory, and decoding.

Cold, the files are on the disk; warm, in the system's cache. Each contender is a fresh process, and generates the same
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Point
from benchmarks.harness import read_rate, resident
from benchmarks.load import OfCheckpoint, Settings, apart, bytes_per_token, out_of_cache, read_over
from gptoss_opt import load, with_fast_linears, with_flash_attention, with_mxfp4_experts
from gptoss_opt.testing import SIZES

STACK = (with_mxfp4_experts(), with_flash_attention(), with_fast_linears())
PROMPT, NEW_TOKENS = 16, 32


def read(folder: Path) -> Any:
    """The model, read into memory."""
    return load(folder, *STACK)


def mapped(folder: Path) -> Any:
    """The model, pointing into its files."""
    return load(folder, *STACK, memory_map=True)


CONTENDERS: dict[str, Callable[[Path], Any]] = {"read": read, "mapped": mapped}


def measured(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Seconds from nothing to the first token, and of decoding; the process's own memory, and with pages of files."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    model = CONTENDERS[name](folder)
    torch.manual_seed(0)
    tokens = torch.randint(2, model.config.vocab_size, (1, PROMPT))
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(tokens, max_new_tokens=1, **options)
    first = time.perf_counter() - begin
    model.generate(tokens, max_new_tokens=NEW_TOKENS, **options)  # now all pages that these tokens need are there
    taken = []
    for count in (1, 1 + NEW_TOKENS):
        begin = time.perf_counter()
        out = model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **options)
        taken.append(time.perf_counter() - begin)
    rate = NEW_TOKENS / (taken[1] - taken[0])
    return {
        "seconds to the first token": round(first, 2),
        "decode tokens/s": round(rate, 2),
        "decode bytes/s": round(rate * bytes_per_token(model)),
        "own bytes": resident("RssAnon"),
        "resident bytes": resident("VmRSS"),
        "model bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "tokens": out[0, PROMPT:].tolist(),
    }


@dataclass(frozen=True)
class Mapped(OfCheckpoint):
    """Both, in turn."""

    cached: bool
    columns = """
        case   | weights | first token  | decode              | of read rate | own memory    | with pages of files
        {case} | {name}  | {first:.1f} s | {rate:.2f} tokens/s | {share:.0%}  | {own!G:.2f} GB | {resident!G:.2f} GB
    """

    def run(self, made: Path, repeats: int) -> list[Point]:
        found = {}
        for name in CONTENDERS:
            (read_over if self.cached else out_of_cache)(made)
            found[name] = apart(measured, name, made, torch.get_num_threads())
        for one in found.values():
            one["share of read rate"] = round(one["decode bytes/s"] / read_rate(), 3)
        return [{"layers": self.layers, "model bytes": found["read"]["model bytes"], **found}]

    def verify(self, made: Path, points: list[Point]) -> None:
        """Both give the same tokens, and what is mapped is nobody's own."""
        super().verify(made, points)
        read, mapped = (points[0][name] for name in CONTENDERS)
        assert mapped["tokens"] == read["tokens"], points
        assert mapped["own bytes"] < read["own bytes"] - 0.9 * read["model bytes"], points

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for name in CONTENDERS:
            one = points[0][name]
            yield {
                "name": name,
                "first": one["seconds to the first token"],
                "rate": one["decode tokens/s"],
                "share": one["share of read rate"],
                "own": one["own bytes"],
                "resident": one["resident bytes"],
            }


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Some layers, or all of them if that is asked for."""
    layers = SIZES["20b"].layers if settings.full else settings.layers
    return [
        Mapped(f"20b shape, {layers} layers, from {where}", folder, layers, cached)
        for where, cached in (("the cache", True), ("the disk", False))
    ]


SETTINGS = Settings()
