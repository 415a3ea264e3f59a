"""One safetensors file: its header, checked whole, and its tensors, read into the memory that will hold them.

Here files are read; `mapped.py` maps them. Mapped pages count as the process's memory for as long as the tensor lives,
cannot be backed by huge pages, and change or fault under a running model when the file is overwritten. Bytes that are
read go once from the file into the tensor, and the file is closed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

MAX_HEADER = 100_000_000
"""Bytes of the longest header: the limit of the safetensors library too."""

SMALL = 2**16
"""Bytes below which a read costs more in being asked for than in being done."""

SCRATCH = 2**22
"""Bytes read at once where small runs are copied out of what surrounds them; at least `2 * SMALL`."""

MAX_READ = 2**24
"""Bytes asked of the system at once, by one thread. Progress is told after each."""

READERS = 4 if hasattr(os, "preadv") else 1
"""Threads that read one tensor: one alone keeps neither the memory nor a disk busy."""

DAMAGED = "The file is damaged or incomplete: download or copy it again."


class CheckpointError(ValueError):
    """A checkpoint cannot be read. The message names the file and the key, what is wrong, and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is, and what it is.

    Attributes:
        file: the safetensors file.
        key: its name there.
        dtype: of its values.
        shape: whole, whatever part of it is read.
        offset: of its first byte, from the start of the file.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """The size in the file, and of the whole tensor in memory, in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.file}: key {self.key!r}"


@contextmanager
def as_checkpoint_errors(what: object) -> Iterator[None]:
    """Name the file (and the key) in the errors of the operating system."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: cannot be read ({error}). Check that it is there and readable.") from error


def parse_object(file: Path, text: bytes) -> dict[str, Any]:
    """The JSON object that `text`, of this file, holds; a key that is there twice is an error."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is there twice")
            found[key] = value
        return found

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not the JSON it should hold: {error}. {DAMAGED}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(parsed).__name__}, not an object. {DAMAGED}")
    return parsed


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by key, in the order of their bytes. No tensor is read.

    The format is that of https://huggingface.co/docs/safetensors: the length of the header in eight little-endian
    bytes, the header in JSON, then the tensors, without gaps. All of it is checked against the size of the file.

    Raises:
        CheckpointError: it cannot be read, or is not a whole and sound safetensors file.

    Example:
        >>> from pathlib import Path
        >>> tensors = read_header(Path(path) / "model-00003.safetensors")
        >>> tensors["lm_head.weight"].shape, tensors["lm_head.weight"].dtype
        ((512, 128), torch.bfloat16)
    """
    with as_checkpoint_errors(file), open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        if start == b"version ":
            raise CheckpointError(f"{file}: a Git LFS pointer, not the file it stands for. Run git lfs pull.")
        if len(start) < 8:
            raise CheckpointError(f"{file}: {size} bytes, fewer than a safetensors file starts with (8). {DAMAGED}")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            problem = f"the header says it is {length} bytes long, more than the {MAX_HEADER} allowed"
            raise CheckpointError(f"{file}: {problem}. It is damaged, or not a safetensors file: download it again.")
        if length > size - 8:
            problem = f"the header says it is {length} bytes long, but {size - 8} follow"
            raise CheckpointError(f"{file}: {problem}. {DAMAGED}")
        header = parse_object(file, stream.read(length))

    header.pop("__metadata__", None)
    tensors = sorted(
        (_entry(file, key, entry, 8 + length) for key, entry in header.items()),
        key=lambda info: (info.offset, info.num_bytes),
    )
    position, previous = 8 + length, "the header"
    for info in tensors:
        if info.offset != position:
            what = "overlap" if info.offset < position else "leave a gap after"
            problem = f"its data_offsets {what} those of {previous}"
            raise CheckpointError(f"{info}: {problem}. {DAMAGED}")
        position, previous = position + info.num_bytes, repr(info.key)
        if position > size:
            end = max(other.offset + other.num_bytes for other in tensors)
            problem = f"ends beyond the end of the file, which lacks {end - size} bytes of the {end} it should have"
            raise CheckpointError(f"{info}: {problem}. {DAMAGED}")
    if position < size:
        problem = f"{size} bytes, {size - position} more than its header accounts for"
        raise CheckpointError(f"{file}: {problem}. {DAMAGED}")
    return {info.key: info for info in tensors}


def _entry(file: Path, key: str, entry: Any, start: int) -> TensorInfo:
    """One tensor, whose bytes are counted from `start`, as its entry in the header describes it."""

    def error(problem: str, advice: str = DAMAGED) -> CheckpointError:
        return CheckpointError(f"{file}: key {key!r}: {problem}. {advice}")

    def counts(name: str) -> list[int]:
        value = entry.get(name)
        # bool is an int, and no file has 2**63 bytes.
        if not isinstance(value, list) or not all(type(count) is int and 0 <= count < 2**63 for count in value):
            raise error(f"{name} is {value!r}, not a list of counts")
        return value

    if not isinstance(entry, dict):
        raise error(f"described by {entry!r}, not by a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), counts("shape"), counts("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise error(f"the dtype is {dtype!r}", f"Convert the tensor to one of {known}, or download the file again.")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"data_offsets is {offsets}, not a start and an end")
    if prod(max(count, 1) for count in shape) >= 2**63:
        raise error(f"shape is {shape}, more than any memory holds")
    info = TensorInfo(file, key, DTYPES[dtype], tuple(shape), start + offsets[0])
    if info.num_bytes != offsets[1] - offsets[0]:
        held = offsets[1] - offsets[0]
        raise error(f"data_offsets {offsets} hold {held} bytes, but shape {shape} of {dtype} takes {info.num_bytes}")
    return info


def read_tensor(
    info: TensorInfo, index: tuple[slice, ...], *, out: Tensor | None, on_bytes: Callable[[int], None] | None
) -> Tensor:
    """A tensor of a safetensors file, or a slice of it: see `Checkpoint.read`."""
    bounds = _bounds(info, index)
    shape = tuple(stop - start for start, stop in bounds)
    if out is None:
        out = torch.empty(shape, dtype=info.dtype, device="cpu")  # whatever torch.device(...) is in force
    elif (tuple(out.shape), out.dtype, out.device.type) != (shape, info.dtype, "cpu") or not out.is_contiguous():
        kind = "contiguous" if out.is_contiguous() else "strided"
        given = f"a {kind} {out.dtype} tensor of shape {list(out.shape)} on {out.device}"
        raise ValueError(f"{info}: out is {given}. Give a contiguous {info.dtype} one of shape {list(shape)} on cpu.")
    if not out.numel():
        return out
    with as_checkpoint_errors(info):
        stream = FileIO(info.file)
    with stream:
        # Bytes are one more dimension, always whole: every dtype is read alike.
        num = info.dtype.itemsize
        target = out.view(-1).view(torch.uint8).view(*shape, num)
        _Source(info, stream, on_bytes).read(info.offset, (*info.shape, num), (*bounds, (0, num)), target)
    return out


def _bounds(info: TensorInfo, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    if len(index) > len(info.shape):
        raise ValueError(f"{info}: {len(index)} slices for shape {list(info.shape)}. Give one per dimension or fewer.")
    bounds = []
    for dim, size in enumerate(info.shape):
        part = index[dim] if dim < len(index) else slice(None)
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise ValueError(f"{info}: the index of dimension {dim} is {part!r}. Give a slice with a step of one.")
        start, stop, _ = part.indices(size)
        bounds.append((start, max(start, stop)))
    return tuple(bounds)


@dataclass
class _Source:
    """An open file, read for one tensor."""

    info: TensorInfo
    stream: FileIO
    on_bytes: Callable[[int], None] | None

    @cached_property
    def scratch(self) -> Tensor:
        return torch.empty(SCRATCH, dtype=torch.uint8, device="cpu")

    def read(self, offset: int, sizes: tuple[int, ...], bounds: tuple[tuple[int, int], ...], target: Tensor) -> None:
        """Read the part within `bounds` of an array of bytes of shape `sizes` at `offset`. Nothing here is empty."""
        (start, stop), row_shape, row_bounds = bounds[0], sizes[1:], bounds[1:]
        row = prod(row_shape)
        strides = [prod(row_shape[dim + 1 :]) for dim in range(len(row_shape))]
        # The needed bytes of every row lie from `low` to `high`.
        low = sum(begin * stride for (begin, _), stride in zip(row_bounds, strides, strict=True))
        high = 1 + sum((end - 1) * stride for (_, end), stride in zip(row_bounds, strides, strict=True))
        if high - low == row:
            self.fill(offset + start * row, target.view(-1))
        elif max(high - low, row - (high - low)) >= SMALL:
            for number in range(start, stop):
                self.read(offset + number * row, row_shape, row_bounds, target[number - start])
        else:
            # Rows in which both what is needed and what is not are small: read over the gaps, and copy.
            part = (slice(None), *(slice(*bound) for bound in row_bounds))
            for first in range(start, stop, SCRATCH // row):
                num = min(SCRATCH // row, stop - first)
                self.fill(offset + first * row + low, self.scratch[low : (num - 1) * row + high])
                target[first - start :][:num] = self.scratch[: num * row].view(num, *row_shape)[part]

    def fill(self, offset: int, target: Tensor) -> None:
        """Read the bytes at `offset` into contiguous memory; many of them by several threads."""
        starts = range(0, target.numel(), MAX_READ)
        offsets, parts = [offset + start for start in starts], [target[start:][:MAX_READ] for start in starts]
        if len(parts) == 1:
            self.tell(self.fill_part(offset, target))
            return
        with ThreadPoolExecutor(READERS) as readers:
            for count in readers.map(self.fill_part, offsets, parts):
                self.tell(count)

    def tell(self, count: int) -> None:
        if self.on_bytes is not None:
            self.on_bytes(count)

    def fill_part(self, offset: int, target: Tensor) -> int:
        left: memoryview = target.numpy().data
        while left:
            with as_checkpoint_errors(self.info):
                count = read_at(self.stream, left, offset)
            if not count:
                problem = f"truncated while reading: {len(left)} bytes are missing, which were there when it was opened"
                raise CheckpointError(f"{self.info}: {problem}. Leave the file alone meanwhile, and open it again.")
            left, offset = left[count:], offset + count
        return target.numel()


def read_at(stream: FileIO, target: memoryview, offset: int) -> int:
    """Read what comes at `offset` of an open file into `target`; returns the number of bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(stream.fileno(), [target], offset)
    stream.seek(offset)
    return stream.readinto(target)
