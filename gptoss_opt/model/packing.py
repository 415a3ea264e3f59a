"""Where the sequences of packed rows begin: told by cumulative lengths, a mask that numbers them, or positions."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.attention import Visible, starts_from_cu_seq_lens, starts_from_positions, starts_from_segments
from ..kernels.paged_attention import Paged

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Packing:
    """Where the sequences of packed rows begin, found once for all layers.

    Attributes:
        positions: by which it was found; None if the decoder was given none.
        starts: integer [B or 1, T]; None if nothing is packed.
        told: whether cumulative lengths or a mask told it, so that positions have nothing to say.
    """

    positions: Tensor | None = None
    starts: Tensor | None = None
    told: bool = False

    def by(self, positions: Tensor | None, visible: Visible) -> Tensor | None:
        """Look again if a layer has other positions than the decoder was given, as after a hook of the user's."""
        traced = torch.compiler.is_compiling() and self.positions is None
        if not self.told and positions is not None and self.positions is not positions and not traced:
            self.positions, self.starts = positions, _starts_by_positions(positions, visible, None)
        return self.starts


def packing_of(given: Mapping[str, Any]) -> Packing:
    """What the arguments of the decoder's forward say. Raises `ValueError` for what cannot be."""
    cu_q, cu_k = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    positions, mask, cache = (given.get(name) for name in ("position_ids", "attention_mask", "past_key_values"))
    tokens: Any = given.get("input_ids")
    if tokens is None and given.get("inputs_embeds") is not None:
        tokens = given["inputs_embeds"][..., 0]
    if cu_q is not None or cu_k is not None:
        if not torch.compiler.is_compiling():
            _check_cu_seq_lens(cu_q, cu_k, tokens, cache)
        return Packing(positions, starts_from_cu_seq_lens(cast(Tensor, cu_q), tokens.shape[1]), told=True)
    starts = None
    if isinstance(mask, Tensor) and mask.ndim == 2 and tokens is not None:
        starts = _starts_by_mask(mask, cache, tokens.shape[1])
        if starts is not None and not torch.compiler.is_compiling():
            return Packing(positions, starts, told=True)
    found = _starts_by_positions(positions, mask, cache)
    if starts is not None:  # while tracing, where neither can be read: the mask may tell
        found = starts if found is None else torch.maximum(starts, found)
    return Packing(positions, found)


def _starts_by_positions(positions: Tensor | None, mask: object, cache: Any) -> Tensor | None:
    """Where the sequences of packed rows begin, integer [B or 1, T]; None if nothing is packed."""
    if isinstance(mask, Mapping):  # by kind of layer, made by `generate` or for pages: they see the same padding
        mask = next(iter(mask.values()))
    if positions is None or positions.ndim != 2 or positions.shape[1] < 2 or isinstance(mask, Paged):
        return None
    # Reading the positions makes a GPU wait. While tracing they cannot be read: they may restart.
    if readable(positions) and not bool((positions[:, 1:] <= positions[:, :-1]).any()):
        return None
    starts = starts_from_positions(positions, _valid(mask, cache, positions))
    if readable(starts) and (mask is not None or cache is not None) and bool(starts.any()):
        _say_once(
            "position_ids restart beside an attention_mask or a cache, and with_flash_attention takes each restart for "
            "a new sequence, which sees nothing before. If that is what you mean, say it without both, or by an "
            "attention_mask that numbers the sequences; if not, give positions that grow."
        )
    return starts


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _valid(mask: object, cache: Any, positions: Tensor) -> Tensor | None:
    """Which of the tokens of these positions [B, T] are no padding, bool; None if all are."""
    num_queries = positions.shape[1]
    first: Any = cache.get_seq_length() if cache is not None else 0
    if isinstance(mask, Visible):
        first, mask = mask.q_start, mask.keys
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    first = mask.shape[1] - num_queries if first is None else first
    if not isinstance(first, Tensor):  # a mask that tells of fewer slots than there are is padded, as for attention
        mask = nn.functional.pad(mask, (0, max(first + num_queries - mask.shape[1], 0)))
    return mask.bool()[:, torch.arange(num_queries, device=mask.device) + first]


def _starts_by_mask(mask: Tensor, cache: Any, num_queries: int) -> Tensor | None:
    """Where packed sequences begin by the numbers that a mask [B, S] gives them, from 1 up."""
    # Reading a mask makes a GPU wait, and a step that decodes has nothing to find: with a cache there are no numbers.
    if mask.dtype == torch.bool or not mask.numel() or (num_queries == 1 and not mask.is_cpu):
        return None
    if not readable(mask):
        whole = cache is None and mask.shape[1] == num_queries and not mask.is_floating_point()
        return starts_from_segments(mask) if whole else None
    low, high = torch.stack(mask.aminmax()).tolist()
    if low < 0 or not math.isfinite(high) or (mask.is_floating_point() and not bool((mask == mask.round()).all())):
        raise ValueError(
            f"attention_mask [batch, len] holds {low if low < 0 else high:g}. It is 0 for padding and 1 for tokens, or "
            "of packed rows the number of each token's sequence, from 1 up."
        )
    if high <= 1:
        return None
    if cache is not None or mask.shape[1] != num_queries:
        raise ValueError(
            f"attention_mask numbers the sequences of packed rows, up to {high:g}, and these cannot continue a cache. "
            "Give each row whole, with past_key_values=None, or a mask of 0 and 1."
        )
    return starts_from_segments(mask)


def _check_cu_seq_lens(cu_q: Tensor | None, cu_k: Tensor | None, tokens: Tensor, cache: Any) -> None:
    if cu_q is None:
        raise ValueError("cu_seq_lens_k was given without cu_seq_lens_q: give both.")
    batch, length = tokens.shape
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q packs sequences into one row, but the batch has {batch} rows.")
    if not isinstance(cu_q, Tensor) or cu_q.ndim != 1 or cu_q.is_floating_point():
        raise ValueError("cu_seq_lens_q is an integer tensor [num_sequences + 1] of cumulative lengths.")
    values = cu_q.tolist()
    if not values or values[0] != 0 or values[-1] > length or values != sorted(values):
        raise ValueError(f"cu_seq_lens_q must grow from 0 to at most the {length} tokens of the row, not {values}.")
    if cu_k is not None and cu_k is not cu_q and cu_k.tolist() != values:
        raise ValueError(
            "cu_seq_lens_k differs from cu_seq_lens_q: packed sequences that continue a cache are not supported. "
            "Give each packed sequence whole, without a cache."
        )
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError("packed sequences (cu_seq_lens_q) cannot continue a cache: give each whole, without one.")


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read: it is not traced, and has some."""
    return not torch.compiler.is_compiling() and not tensor.is_meta
