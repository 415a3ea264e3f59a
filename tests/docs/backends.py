"""The tables of docs/backends.md, from what backends say of themselves: python -m tests.docs.backends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gptoss_opt.kernels import attention, experts, linear, native, paged_attention
from gptoss_opt.kernels.paged_attention.impl import triton as paged_triton

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"
BEGIN, END = "<!-- made by python -m tests.docs.backends -->\n", "<!-- until here -->"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES = (2880, 2880)
HEAD_DIM = 64
LIBRARY = "the native library"
TRITON = "triton 3.2 or newer; compute capability 8.0 or newer; no ROCm"
NOTES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "Attention, [`with_flash_attention`](flash_attention.md)": {
        "fa4": ("", "its kernel, which knows sinks"),
        "fa3": ("", "its kernel, corrected through its log-sum-exp"),
        "fa2": ("", "its kernel, corrected through its log-sum-exp"),
        "native": (
            f"{LIBRARY}; a head_dim that is a multiple of 16",
            "one query per row (decoding), and the rotary embedding; several queries in bfloat16 on AVX-512 BF16, "
            "where nothing is padded or packed; all else, and gradients, as `torch`",
        ),
        "torch": ("no ROCm", "torch's flash and memory-efficient kernels, corrected through their log-sum-exp"),
        "reference": ("to be named", "plain matrix products, in quadratic memory; defines the semantics"),
    },
    "Packed experts, [`with_mxfp4_experts`](mxfp4.md)": {
        "triton": (TRITON, "decodes in registers; for very many rows dequantises to a temporary"),
        "native": (LIBRARY, "decodes in registers or, for more rows, into the cache; sums in float32"),
        "reference": ("", "dequantises one expert at a time; defines the semantics"),
    },
    "Dense experts, [`with_fast_experts`](fast_experts.md)": {
        "native": (
            f"{LIBRARY}; AVX-512 BF16 with VBMI; a processor on which it was measured to be faster (Zen 4, Zen 5); "
            "sizes that are multiples of 32",
            "one product per projection for all experts",
        ),
        "torch": (
            "rows of a multiple of 16 bytes",
            "torch's `grouped_mm`, the activation in one pass where a kernel above has it",
        ),
        "reference": ("", "one expert after the other; defines the semantics"),
    },
    "Linear layers of few rows, [`with_fast_linears`](fast_linears.md)": {
        "native": (
            f"{LIBRARY}; a processor on which it was measured to be faster (Zen 5)",
            "weights read once, sums in float32; the norms too; more rows and training stay torch's",
        ),
        "torch": ("", "nothing: torch's own products"),
    },
    "Attention on pages, in a [`ContinuousBatcher`](continuous_batching.md)": {
        "native": (
            f"{LIBRARY}; a head_dim that is a multiple of 16",
            "all queries of a layer in one call, sums in float32",
        ),
        "triton": (TRITON, "decoding, in parts of each sequence's keys; prompts by the backend of attention"),
        "torch": ("", "decoding in plain operations; prompts by the backend of attention"),
    },
}
"""What no function can tell, by kernel and backend: what is needed beside device and dtype, and what it does."""


@contextmanager
def with_everything() -> Iterator[None]:
    """As on a machine where all packages are installed, on a Zen 5 beside an H100."""
    spec, library = object(), native.Library(None, native.BFLOAT16, None)  # type: ignore[arg-type]
    patches = (
        patch("importlib.util.find_spec", return_value=spec),
        patch("importlib.metadata.version", return_value="99"),
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        patch("torch.version.hip", None),
        patch("gptoss_opt.kernels.native._loaded", return_value=library),
        patch("gptoss_opt.kernels.native.INSTRUCTION_SETS", native.X86_SETS),
        patch("gptoss_opt.kernels.kernel_table.INSTRUCTION_SETS", native.X86_SETS),
        patch("gptoss_opt.kernels.experts.impl.native.INSTRUCTION_SETS", native.X86_SETS),
        patch("gptoss_opt.kernels.kernel_table.processor", return_value="Zen 5"),
    )
    with ExitStack() as stack:
        # What is loaded is kept, before and behind: nothing of either must be left to the other.
        stack.callback(native.library.cache_clear)
        native.library.cache_clear()
        for one in patches:
            stack.enter_context(one)
        yield


def asked(kernel: str) -> tuple[Sequence[str], Any]:
    """The names of a kernel's backends in order, and what says why one does not serve a device and a dtype."""
    known: tuple[tuple[Sequence[Any], Any], ...] = (
        (attention.BACKENDS, lambda device, dtype: attention.AttentionRequest(device, dtype, HEAD_DIM)),
        (experts.PACKED_BACKENDS, lambda device, dtype: experts.ExpertsRequest(device, dtype, SIZES)),
        (experts.DENSE_BACKENDS, lambda device, dtype: experts.ExpertsRequest(device, dtype, SIZES)),
        (linear.BACKENDS, linear.LinearRequest),
    )
    if (number := [*NOTES].index(kernel)) < len(known):
        backends, request = known[number]
        by_name = {one.name: one for one in backends}
        return [*by_name], lambda name, device, dtype: by_name[name].why_not(request(device, dtype))
    reasons = {
        "native": lambda device, dtype: native.why_no_attention(device, dtype, HEAD_DIM),
        "triton": paged_triton.why_not,
        "torch": lambda device, dtype: None,
    }
    return [*paged_attention.BACKENDS], lambda name, device, dtype: reasons[name](device, dtype)


def served(why_not: Any, name: str, device: str) -> str:
    """The dtypes in which a backend serves on a device."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES if why_not(name, device, dtype) is None]
    return "all" if len(names) == len(DTYPES) else ", ".join(names) or "no"


def needs(kernel: str, name: str) -> str:
    """What is needed beside device and dtype."""
    packages = [one for one in attention.BACKENDS if hasattr(one, "distribution") and one.name == name]
    if packages and kernel.startswith("Attention, "):
        one = packages[0]
        major = one.capabilities
        capability = f"{major[0]} to {major[-1]}" if len(major) > 1 else str(major[0])
        return f"{one.distribution} {one.min_version} or newer; compute capability {capability}"
    return NOTES[kernel][name][0]


def tables() -> str:
    """All tables, as they stand on the page."""
    lines: list[str] = []
    for kernel in NOTES:
        names, why_not = asked(kernel)
        assert list(NOTES[kernel]) == list(names), f"{kernel}: describe {names} in NOTES, in this order"
        lines += ["", f"{kernel}:", "", "| name | on CPUs | on CUDA | needs | what it does |", "|---|---|---|---|---|"]
        for name in names:
            dtypes = " | ".join(served(why_not, name, device) for device in ("cpu", "cuda"))
            lines.append(f"| `{name}` | {dtypes} | {needs(kernel, name)} | {NOTES[kernel][name][1]} |")
    return "\n".join(lines[1:]) + "\n"


def page() -> str:
    """The whole page: what is written by hand, and the tables in it."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    with with_everything():
        made = re.sub(r" +\|", " |", tables())
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
