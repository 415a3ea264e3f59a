"""Writing safetensors files tensor by tensor, of which one at a time is in memory.

Format: eight bytes with the length of a header in JSON, the header, then the bytes of the tensors one after the other
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .reader import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Described:
    """A tensor to come: its key, shape and dtype."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: Sequence[Described], max_bytes: int) -> dict[str, list[Described]]:
    """Decide which tensors go into which file of a checkpoint: as many as `max_bytes` hold, one at least."""
    groups: list[list[Described]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(one.num_bytes for one in groups[-1]) + tensor.num_bytes > max_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def index_of(files: Mapping[str, Sequence[Described]]) -> dict[str, object]:
    """The index of a checkpoint of several files."""
    tensors = {tensor.key: (name, tensor) for name, group in files.items() for tensor in group}
    sizes = {
        "total_parameters": sum(math.prod(tensor.shape) for _, tensor in tensors.values()),
        "total_size": sum(tensor.num_bytes for _, tensor in tensors.values()),
    }
    return {"metadata": sizes, "weight_map": {key: name for key, (name, _) in sorted(tensors.items())}}


def write_file(
    file: Path,
    described: Sequence[Described],
    tensors: Iterator[tuple[str, Tensor | None]],
    *,
    on_bytes: Callable[[int], object],
) -> None:
    """Write a file of the tensors that were described, which come with their keys, in their order.

    `on_bytes` is called with the size of each that has been written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in described:
        offsets = [end, end := end + one.num_bytes]
        header[one.key] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for one in described:
            key, tensor = next(tensors)
            assert tensor is not None
            assert (one.key, one.shape, one.dtype) == (key, tuple(tensor.shape), tensor.dtype), (one, key, tensor.shape)
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_bytes(one.num_bytes)
