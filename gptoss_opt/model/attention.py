"""How attention is reached inside a transformers GPT-OSS model: the attention and mask interfaces, and one call check.

Two keys must be registered for a backend, one per interface: an attention key without a mask key gets no mask at all,
with no error. A key must not contain "flash" or "sdpa": transformers rewrites the first and refuses the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from ..core import Journal
from ..kernels.attention import (
    BACKENDS,
    AttentionRequest,
    Visible,
    attention,
    dense_mask,
    starts_from_cu_seq_lens,
)
from ..kernels.paged_attention import Paged, paged_attention
from ..kernels.rotary import is_served, rotate
from .host import config_paths
from .modules import NO_LAYERS, WRAPPED, attention_modules, decoder_path, execution_device, is_plain, own_forward
from .packing import Packing, packing_of, readable

KEY = "gptoss_opt:{}"

ATTENTION = "the attention computation"
"""A slot of a model: see `Wrapper`."""

PACKING = "gptoss_opt_packing"
"""The keyword under which a forward hands its layers where packed sequences begin."""


def attention_request(model: nn.Module) -> AttentionRequest:
    """What a backend must serve on this model."""
    layer = cast(Any, model).base_model.layers[0].self_attn
    weight = layer.q_proj.weight
    return AttentionRequest(execution_device(layer.q_proj, weight).type, weight.dtype, layer.head_dim)


def why_no_flash(model: nn.Module) -> Iterator[str]:
    """Say what this model asks of attention that no flash kernel does."""
    config = cast(PreTrainedModel, model).config
    if not attention_modules(model):
        yield NO_LAYERS
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
    for path, _ in attention_modules(model):
        journal.set(model, path, WRAPPED, True)
    path = decoder_path(model)
    journal.add_pre_hook(model, path, prepare_call)
    rotated = set_rotation(model, journal) if backend == "native" else ()
    return (
        *rotated,
        f"config._attn_implementation: {before} -> {key}, on the model's own copy of the config",
        f"{path or 'the model'}: a forward pre-hook that refuses what attention cannot do, such as output_attentions",
    )


def set_rotation(model: nn.Module, journal: Journal) -> tuple[str, ...]:
    """Let queries and keys be rotated by the native library; returns what was changed, as sentences."""
    modules = [
        (path, module)
        for path, module in attention_modules(model)
        if type(module).forward is FORWARD and ROTATION in _NAMED
    ]
    if not modules:
        return ()
    for path, _ in modules:
        journal.around(model, path, natively_rotated, None)
    return (f"self_attn ({len(modules)}): the rotary embedding by the native library, unless it trains",)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`, natively where nothing needs torch's operations."""
    if args or kwargs or not (is_served(q, cos, sin) and is_served(k, cos, sin)):
        return cast(tuple[Tensor, Tensor], apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs))
    return rotate(q, cos, sin), rotate(k, cos, sin)


ROTATION = apply_rotary_pos_emb.__name__
FORWARD = cast(FunctionType | None, own_forward(GptOssAttention))
_NAMED = {name: FORWARD.__globals__.get(name) for name in FORWARD.__code__.co_names} if FORWARD else {}
"""What the names in that forward mean."""


def _with_our_rotation(forward: FunctionType) -> FunctionType:
    """The forward of transformers' attention, but that the name of the rotation in it means ours."""
    names = {**forward.__globals__, ROTATION: _rotated}
    rotated = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rotated.__kwdefaults__ = forward.__kwdefaults__
    return rotated


_ROTATED_FORWARD = _with_our_rotation(FORWARD) if FORWARD else None


def is_transformers() -> bool:
    """Whether the names in that forward still mean what they did, as nobody has put something else there."""
    return FORWARD is not None and all(FORWARD.__globals__.get(name) is meant for name, meant in _NAMED.items())


def natively_rotated(
    _: None, module: Any, inner: Callable[..., tuple[Tensor, Any]], *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The forward of an attention layer with our rotation, unless it means something else by now, or trains."""
    if _ROTATED_FORWARD is None or not is_transformers() or not is_plain(module, inner, FORWARD):
        return inner(*args, **kwargs)
    return cast(tuple[Tensor, Any], _ROTATED_FORWARD(module, *args, **kwargs))


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
    return args, {**kwargs, PACKING: packing_of(given)}


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
    if read and readable(attention_mask) and bool(attention_mask.all()):
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
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, H, T, D] to ([B, T, H, D], no weights)."""
    if WRAPPED not in module.__dict__:
        return _eager(module, query, key, value, attention_mask, scaling, dropout, sliding_window)
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
    if visible.keys is not None and sliding_window == 1:
        # transformers' cache means to keep no key for a window of one, and keeps all.
        key, value = (x[:, :, -visible.keys.shape[1] :] for x in (key, value))
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


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    """transformers' own attention, for a model that has the config of a wrapped one, but no wrapper is on it."""
    if not isinstance(mask, Tensor):
        seen = dense_mask(mask or Visible(), query.shape[2], key.shape[2], sliding_window, query.device)
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    out, weights = eager_attention_forward(module, query, key, value, mask, scaling, dropout)
    return out, weights


for _backend in BACKENDS:
    ALL_ATTENTION_FUNCTIONS.register(KEY.format(_backend.name), partial(attention_forward, backend=_backend.name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(KEY.format(_backend.name), mask_for_attention)
