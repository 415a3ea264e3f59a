"""Which processor this is, as far as kernels were measured on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

KNOWN = {
    ("AuthenticAMD", "25", "avx512f"): "Zen 4",  # with AVX-512 the family is Zen 4; without, Zen 3
    ("AuthenticAMD", "26", "avx512f"): "Zen 5",
    ("GenuineIntel", "6", "amx_bf16"): "Xeon with AMX",
}
"""Names by vendor, family, and a flag that must be there."""


@cache
def _fields() -> dict[str, str]:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


@cache
def processor() -> str:
    """The name of this CPU's kind in `KNOWN`, or "another processor"."""
    fields = _fields()
    return named(fields.get("vendor_id", ""), fields.get("cpu family", ""), fields.get("flags", ""))


@cache
def has(flag: str) -> bool:
    """Whether this CPU has an instruction set, by its name in /proc/cpuinfo; False where there is no such file."""
    return flag in _fields().get("flags", "").split()


def named(vendor: str, family: str, flags: str) -> str:
    """The name of a CPU's kind.

    Example:
        >>> named("AuthenticAMD", "26", "avx2 avx512f"), named("GenuineIntel", "6", "avx2")
        ('Zen 5', 'another processor')
    """
    found = (
        name for (of, number, flag), name in KNOWN.items() if (of, number) == (vendor, family) and flag in flags.split()
    )
    return next(found, "another processor")
