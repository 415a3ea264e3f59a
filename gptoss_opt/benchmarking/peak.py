"""`PeakMemory`: the most memory that a process held meanwhile."""

from __future__ import annotations

import gc
from pathlib import Path

import torch


class PeakMemory:
    """Peak memory beyond what is held now: torch's own count on CUDA, resident memory of the process on Linux.

    The kernel keeps the peak of resident memory, so no short one is missed; writing 5 to clear_refs resets it.

    Example:
        >>> memory = PeakMemory(torch.device("cpu"))
        >>> memory.reset()
        >>> room = torch.ones(4 << 20)
        >>> peak = memory.peak()  # on Linux, about 16 MB
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
        highest = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return None if self.held is None or highest is None else max(highest - self.held, 0)


def _resident(field: str) -> int | None:
    """This line of the kernel's account of the process, in bytes; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
