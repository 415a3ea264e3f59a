"""How attention is reached inside a transformers GPT-OSS model: the attention and mask interfaces, and one call check.

Two keys must be registered for a backend, one per interface: an attention key without a mask key gets no mask at all,
with no error. A key must not contain "flash" or "sdpa": transformers rewrites the first and refuses the second.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core import Journal
from ..kernels.attention import (
    BACKENDS,
    AttentionRequest,
    Visible,
    attention,
    starts_from_cu_seq_lens,
    starts_from_positions,
    starts_from_segments,
)
from ..kernels.paged_attention import Paged, paged_attention
from .host import config_paths
from .modules import decoder_path

KEY = "gptoss_opt:{}"

logger = logging.getLogger(__name__)

ATTENTION = "the attention computation"
"""A slot of a model: see `Wrapper`."""

PACKING = "gptoss_opt_packing"
"""The keyword under which a forward hands its layers where packed sequences begin."""


def attention_request(model: nn.Module) -> AttentionRequest:
    """What a backend must serve on this model."""
    layer = cast(Any, model).base_model.layers[0].self_attn
    return AttentionRequest(layer.q_proj.weight.device.type, layer.q_proj.weight.dtype, layer.head_dim)


def why_no_flash(model: nn.Module) -> Iterator[str]:
    """Say what this model asks of attention that no flash kernel does."""
    config = cast(PreTrainedModel, model).config
    if config.attention_dropout:
        yield (
            f"attention_dropout is {config.attention_dropout}, and no flash kernel here has dropout. "
            "Build the model with attention_dropout=0.0 in its config."
        )
    if config.output_attentions:
        yield (
            "config.output_attentions is on, and no flash kernel computes the weights. "
            "Set model.config.output_attentions = False."
        )
    if not getattr(config, "is_causal", True):
        yield "config.is_causal is off, and these kernels are causal. Keep this model in eager attention."


def set_attention(model: nn.Module, backend: str, journal: Journal) -> tuple[str, ...]:
    """Make `backend` the model's attention; returns what was changed, as sentences."""
    before, key = cast(PreTrainedModel, model).config._attn_implementation, KEY.format(backend)
    for path in config_paths(model):
        journal.set(model, path, "_attn_implementation", key)
    path = decoder_path(model)
    journal.add_pre_hook(model, path, prepare_call)
    return (
        f"config._attn_implementation: {before} -> {key}, on the model's own copy of the config",
        f"{path or 'the model'}: a forward pre-hook that refuses what attention cannot do, such as output_attentions",
    )


PARAMETERS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
"""The positional parameters of the decoder's forward."""


def prepare_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook of the decoder, for what is the same in all layers.

    It refuses what attention cannot do, and finds where packed sequences begin.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: no flash kernel computes the attention weights. "
            "Take the wrapper off first: undo(model, with_flash_attention)."
        )
    given = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
    return args, {**kwargs, PACKING: _packing(given)}


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


def _packing(given: Mapping[str, Any]) -> Packing:
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
    if _readable(positions) and not bool((positions[:, 1:] <= positions[:, :-1]).any()):
        return None
    starts = starts_from_positions(positions, _valid(mask, cache, positions))
    if _readable(starts) and (mask is not None or cache is not None) and bool(starts.any()):
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
    if not _readable(mask):
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


def mask_for_attention(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visible | Tensor | None:
    """transformers' mask interface: the padding mask and offsets of a causal or sliding layer, as a `Visible`.

    A mask that transformers composed from functions of the user's own (`use_vmap`) is built in full.
    """
    if use_vmap:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=cast(int, q_offset),
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            use_vmap=True,
            device=device,
            **{**kwargs, "allow_is_causal_skip": False},
        )
    keys = _key_mask(attention_mask, batch_size, q_length, kv_length, kv_offset)
    q_start = q_offset - kv_offset
    start: Tensor | None
    if isinstance(q_start, Tensor):
        start = q_start.to(device)
    else:
        start = None if q_start == kv_length - q_length else torch.full((), q_start, device=device)
    return None if keys is None and start is None else Visible(start, keys)


def _key_mask(
    attention_mask: Tensor | None, batch: int, q_length: int, kv_length: int, kv_offset: int
) -> Tensor | None:
    """The padding of the cache slots [B, S], or None if there is none to be seen."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            "with_flash_attention takes an attention_mask [batch, len], or one of your own "
            f"[batch, 1 or heads, q_len, kv_len], not {list(attention_mask.shape)}."
        )
    # Reading the mask makes a GPU wait, and would break the capture of a decode step.
    read = attention_mask.is_cpu or q_length > 1
    if read and _readable(attention_mask) and bool(attention_mask.all()):
        return None
    # Slots of a static cache that are still empty lie beyond the mask; causality hides them, so any value will do.
    missing = kv_length + kv_offset - attention_mask.shape[1]
    keys = nn.functional.pad(attention_mask.bool(), (0, max(missing, 0)), value=False)
    return keys[:, kv_offset : kv_offset + kv_length].expand(batch, -1)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Paged | Tensor | None,
    *,
    backend: str,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    gptoss_opt_packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D] to ([B, T, H, D], no weights)."""
    if dropout:
        raise ValueError(f"with_flash_attention has no dropout, but attention_dropout is {dropout}: set it to 0.0.")
    if kwargs.get("cache") is not None:
        raise ValueError(
            "generate_batch hands attention a paged cache, which with_flash_attention does not read. "
            "Use generate, or take the wrapper off first: undo(model, with_flash_attention)."
        )
    sinks = cast(Tensor, module.sinks)
    if isinstance(attention_mask, Paged):
        out = paged_attention(
            query,
            key,
            value,
            sinks,
            paged=attention_mask,
            layer=cast(int, module.layer_idx),
            scale=scaling,
            window=sliding_window,
            backend=backend,
        )
        return out, None
    visible = attention_mask if isinstance(attention_mask, Visible) else Visible(mask=attention_mask)
    if visible.keys is not None and visible.keys.shape[1] != key.shape[2]:
        raise ValueError(f"attention_mask tells of {visible.keys.shape[1]} tokens, but there are {key.shape[2]} keys.")
    if visible.mask is None and query.shape[2] > 1:
        if gptoss_opt_packing is None:  # a layer that is called by itself, without its decoder
            cu_q = kwargs.get("cu_seq_lens_q")
            told = None if cu_q is None else starts_from_cu_seq_lens(cu_q, query.shape[2])
            gptoss_opt_packing = Packing(starts=told, told=cu_q is not None)
        starts = gptoss_opt_packing.by(position_ids, visible)
        if starts is not None:
            visible = visible._replace(starts=starts.expand(len(query), -1))
    out = attention(query, key, value, sinks, scale=scaling, window=sliding_window, visible=visible, backend=backend)
    return out.transpose(1, 2).contiguous(), None


def _readable(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not tensor.is_meta


for _backend in BACKENDS:
    ALL_ATTENTION_FUNCTIONS.register(KEY.format(_backend.name), partial(attention_forward, backend=_backend.name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(KEY.format(_backend.name), mask_for_attention)
