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
def processor() -> str:
    """The name of this CPU's kind in `KNOWN`, or "another processor"."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    # The first processor's, from the keys before the colons.
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return named(fields.get("vendor_id", ""), fields.get("cpu family", ""), fields.get("flags", ""))


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
