"""When torch's grouped product waits for the GPU."""

from __future__ import annotations

import torch

ONE_KERNEL = (9, 10)
"""The major compute capabilities on which all groups are one kernel, in bfloat16; others go expert by expert."""


def why_grouped_waits(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why `torch.nn.functional.grouped_mm` waits for a GPU, or None."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in ONE_KERNEL:
        return None
    kinds = " and ".join(f"{major}.x" for major in ONE_KERNEL)
    return f"torch's grouped product of {dtype} asks how many rows each expert has: bfloat16 on {kinds} does not"
