"""MXFP4 as a storage: expert weights as in the released checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..kernels import memory
from ..kernels.codes import Codes
from ..kernels.mxfp4 import BLOCK, pack_columns, unpack
from .storage import STORAGES, Sliced, Split, Storage, Stored


class Mxfp4(Storage):
    """Dense expert weights `[E, in, out]` as blocks and scales of `[E, out, in]`."""

    name: str = "mxfp4"
    suffixes: tuple[str, ...] = ("_blocks", "_scales")
    kind: type[nn.Parameter] = Codes

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return the reason why a parameter of this shape cannot be stored so, as a sentence, or None."""
        if len(shape) != 3 or shape[1] % BLOCK:
            return f"MXFP4 takes expert weights [E, in, out] whose `in` is a multiple of {BLOCK}."
        return None

    def encode(self, dense: Sliced) -> Stored:
        """Quantise, one expert at a time."""
        num_experts, num_in, num_out = dense.shape
        shape = (num_experts, num_out, num_in // BLOCK)
        blocks = memory.empty((*shape, BLOCK // 2), torch.uint8, dense.device)
        scales = memory.empty(shape, torch.uint8, dense.device)
        signal = noise = 0.0
        for e in range(num_experts):
            of_values, of_errors = pack_columns(dense[e], blocks[e], scales[e])
            signal, noise = signal + of_values, noise + of_errors
        sqnr = 10 * math.log10(signal / noise) if noise else math.inf
        return Stored({"_blocks": blocks, "_scales": scales}, sqnr)

    def decode(self, tensors: Mapping[str, Sliced], dtype: torch.dtype) -> Tensor:
        """Dequantise, one expert at a time."""
        blocks, scales = tensors["_blocks"], tensors["_scales"]
        num_experts, num_out, num_blocks = scales.shape
        dense = memory.empty((num_experts, num_blocks * BLOCK, num_out), dtype, blocks.device)
        for e in range(num_experts):
            dense[e] = unpack(blocks[e], scales[e], dtype).T
        return dense

    def split(self, split: Split) -> Split:
        """Say where a split of `[E, in, out]` falls in `[E, out, in / 32]`."""
        if split.dim != 1:
            return replace(split, dim={0: 0, 2: 1}[split.dim])
        if any(not isinstance(part, range) or part.start % BLOCK or part.stop % BLOCK for part in split.parts):
            raise ValueError(f"MXFP4 packs {BLOCK} values of a row together, and the parts {split.parts} tear them.")
        blocks = (range(part.start // BLOCK, part.stop // BLOCK) for part in split.parts if isinstance(part, range))
        return replace(split, dim=2, parts=tuple(blocks))

    def described(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a parameter of this shape, by suffix, on the meta device."""
        num_experts, num_in, num_out = shape
        scales = torch.empty(num_experts, num_out, num_in // BLOCK, dtype=torch.uint8, device="meta")
        return {"_blocks": scales.new_empty(*scales.shape, BLOCK // 2), "_scales": scales}

    def num_bytes(self, num_values: int, itemsize: int) -> int:
        """Count half a byte for each value, and one for the scale of each block."""
        return num_values * (BLOCK // 2 + 1) // BLOCK


MXFP4 = Mxfp4()
STORAGES[MXFP4.name] = MXFP4
