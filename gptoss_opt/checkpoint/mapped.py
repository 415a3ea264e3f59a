"""Files that a model's weights are mapped from, instead of read: the system brings their pages when they are used.

Pages are private: writing to a weight, as training does, changes memory and no file. They are shared by all processes
that map a file, come from the system's cache, and are dropped instead of swapped where memory is short.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..layout import Part
from ..model.saving import MAPPED, save_pretrained
from .reader import CheckpointError, TensorInfo, as_checkpoint_errors

Identity = tuple[int, int, int, int]
"""A file as it was: device, inode, size and time of the last change."""


@dataclass
class MappedFiles:
    """Files of a checkpoint that are mapped, each once, as soon as a tensor in it is asked for.

    Those are forgotten in which no tensor lies any more, as after a model was cast or moved.

    Attributes:
        seen: what each file was when it was mapped, by its absolute path.
    """

    seen: dict[Path, Identity] = field(default_factory=dict[Path, Identity])
    _maps: WeakValueDictionary[Path, mmap.mmap] = field(
        default_factory=WeakValueDictionary[Path, mmap.mmap], repr=False
    )
    _held: list[mmap.mmap] = field(default_factory=list[mmap.mmap], repr=False)

    def __iter__(self) -> Iterator[Path]:
        """The files in which there are tensors."""
        return iter([file for file in self.seen if file in self._maps])

    def release(self) -> None:
        """Leave it to the tensors to hold the files that they lie in."""
        self._held.clear()

    def tensor(self, info: TensorInfo, parts: Sequence[Part]) -> Tensor | None:
        """A tensor in its file, or rows of it that lie one after the other; None if others are asked for."""
        count = prod(map(len, parts))
        offset = info.offset
        if parts:
            first, *rest = parts
            whole = all(part == range(size) for part, size in zip(rest, info.shape[1:], strict=True))
            if not isinstance(first, range) or first.step != 1 or not whole:
                return None
            offset += first.start * prod(info.shape[1:]) * info.dtype.itemsize
        if not count or offset % info.dtype.itemsize:
            return None
        values = torch.frombuffer(self._map(info), dtype=info.dtype, count=count, offset=offset)
        return values.view([len(part) for part in parts])

    def _map(self, info: TensorInfo) -> mmap.mmap:
        file = Path(os.path.abspath(info.file))
        found = self._maps.get(file)
        if found is None:
            with as_checkpoint_errors(info), open(info.file, "rb") as stream:
                self.seen[file] = _identity(os.fstat(stream.fileno()))
                found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[file] = found
            self._held.append(found)
        if info.offset + info.num_bytes > len(found):
            raise CheckpointError(f"{info}: the file was cut while it was opened. Copy it again, and load again.")
        return found

    def check(self) -> None:
        """Raise `CheckpointError` if a file is another one by now: what is computed with it could be anything."""
        for file in self:
            try:
                same = _identity(os.stat(file)) == self.seen[file]
            except OSError:
                same = False
            if not same:
                raise CheckpointError(
                    f"{file}: was changed, replaced or removed while a model is mapped from it (memory_map=True). Load "
                    "the model again, and leave the file alone meanwhile; without memory_map=True it may be changed."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or what pickle makes of it, has values of its own: it is mapped from nothing."""
        return MappedFiles, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFiles:
        return MappedFiles()


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


_check: Callable[[MappedFiles], None] = torch.compiler.disable(
    MappedFiles.check, reason="a model that load(memory_map=True) made looks at its files before each forward"
)


def check_files(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: see `MappedFiles.check`."""
    _check(module.__dict__[MAPPED])


def watch(model: Any, files: MappedFiles) -> None:
    """Let a model check the files it is mapped from before each forward, and not be saved over them."""
    for module in {model, model.base_model}:
        module.__dict__[MAPPED] = files
    model.base_model.register_forward_pre_hook(check_files, with_kwargs=True)
    model.save_pretrained = partial(save_pretrained, model)
