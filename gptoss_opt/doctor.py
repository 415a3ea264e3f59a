"""`doctor`: what is installed, which devices there are, and which backend serves which kernel."""

from __future__ import annotations

import html
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from .kernels.attention import BACKENDS as ATTENTION_BACKENDS
from .kernels.attention import AttentionRequest
from .kernels.experts import DENSE_BACKENDS, PACKED_BACKENDS, ExpertsRequest
from .kernels.kernel_table import LINEARS, described
from .kernels.native import computes_on, why_not
from .kernels.processor import processor
from .planner import HardwareError, detected
from .table import Table
from .version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton", "flash-attn", "peft", "trl", "matplotlib")
"""What matters here: what is needed, and what makes more possible."""
HEAD_DIM, SIZES = 64, (2880, 2880)
"""Those of the released models."""


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found: prints as tables, and holds the facts.

    Attributes:
        facts: of Python, packages, processor and devices, in words by what they are.
        backends: for each kernel, each backend and why it does not serve here (None: it does), in order of preference.
        advice: what could be done, as sentences.
    """

    facts: dict[str, str]
    backends: dict[str, dict[str, str | None]]
    advice: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Which backends are chosen, in a sentence."""
        chosen = {
            kernel: next((name for name, reason in some.items() if reason is None), "none")
            for kernel, some in self.backends.items()
        }
        return "Chosen here, in bfloat16: " + ", ".join(f"{kernel} by {name}" for kernel, name in chosen.items()) + "."

    @property
    def tables(self) -> Sequence[Table]:
        """Facts, backends and advice."""
        rows = [
            (kernel, name, "serves" if reason is None else reason)
            for kernel, some in self.backends.items()
            for name, reason in some.items()
        ]
        found = [Table(("what", "here"), list(self.facts.items())), Table(("kernel", "backend", "here"), rows)]
        return [*found, Table(("advice",), [(one,) for one in self.advice])] if self.advice else found

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return {"facts": self.facts, "backends": self.backends, "advice": list(self.advice), "verdict": self.verdict}

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *map(str, self.tables)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.verdict)}</p>" + "".join(table._repr_html_() for table in self.tables)


def doctor() -> Diagnosis:
    """What is installed, which devices there are, and which backend serves which kernel, and why not the others.

    Example:
        >>> found = doctor()
        >>> found.backends["attention"]["torch"] is None
        True
        >>> print(found.verdict)
        Chosen here, in bfloat16: attention by ..., packed experts by ..., dense experts by ...
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    attention, experts = AttentionRequest(kind, torch.bfloat16, HEAD_DIM), ExpertsRequest(kind, torch.bfloat16, SIZES)
    known: dict[str, tuple[Sequence[Any], Any]] = {
        "attention": (ATTENTION_BACKENDS, attention),
        "packed experts": (PACKED_BACKENDS, experts),
        "dense experts": (DENSE_BACKENDS, experts),
    }
    backends = {kernel: {one.name: _reason(one, request) for one in some} for kernel, (some, request) in known.items()}
    return Diagnosis(_facts(), backends, tuple(_advice(kind)))


def _reason(backend: Any, request: Any) -> str | None:
    reason: str | None = backend.why_not(request)
    return reason or ("serves, but only if it is named" if backend.only_named else None)


def _facts() -> dict[str, str]:
    facts = {"gptoss_opt": __version__, "Python": f"{platform.python_version()} on {platform.platform()}"}
    facts |= {name: _version(name) for name in PACKAGES}
    native = why_not("cpu", torch.bfloat16)
    facts["processor"] = f"{processor()}, {torch.get_num_threads()} threads"
    facts["native library"] = f"computes on {computes_on()}" if native is None else native
    if native is None:
        facts["linear layers"] = described(LINEARS[0], torch.bfloat16)
    try:
        facts["devices"] = str(detected())
    except HardwareError as error:
        facts["devices"] = str(error)
    return facts


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _advice(kind: str) -> list[str]:
    found = []
    if why_not("cpu", torch.bfloat16) is not None:
        found.append("install a C compiler and this package again, so that its native library is built")
    if kind == "cuda":
        if importlib.util.find_spec("flash_attn") is None:
            found.append("pip install flash-attn, whose attention kernels are preferred to torch's")
        if importlib.util.find_spec("triton") is None:
            found.append("pip install triton, which computes packed experts on a GPU")
    return found
