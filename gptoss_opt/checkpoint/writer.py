"""Writing safetensors files tensor by tensor, of which one at a time is in memory.

Format: eight bytes with the length of a header in JSON, the header, then the bytes of the tensors one after the other
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .reader import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_files(
    files: Mapping[Path, Mapping[str, Tensor]],
    tensors: Iterator[tuple[str, Tensor | None]],
    *,
    on_bytes: Callable[[int], object],
) -> None:
    """Write the files of a checkpoint at once.

    Args:
        files: for each the tensors that go into it, by key, on the meta device.
        tensors: all of them with their values; those of one file in its order.
        on_bytes: called with the size of each that has been written.
    """
    with ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}
        for file, described in files.items():
            stream = stack.enter_context(file.open("wb"))
            stream.write(_header(described))
            streams |= dict.fromkeys(described, stream)
        for key, tensor in tensors:
            assert tensor is not None
            streams[key].write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_bytes(tensor.nbytes)


def _header(described: Mapping[str, Tensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in described.items():
        offsets = [end, end := end + tensor.nbytes]
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
