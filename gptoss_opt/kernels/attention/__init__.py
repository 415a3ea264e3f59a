"""Attention with sinks, causal, with or without a sliding window: `attention` and its backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from ..tracing import is_traced
from .backends import BACKENDS, KERNELS, AttentionRequest
from .impl.reference import reference_attention
from .op import sink_attention
from .visible import Rules, Visible, dense_mask, starts_from_cu_seq_lens, starts_from_positions, starts_from_segments


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    *,
    scale: float,
    window: int | None = None,
    visible: Visible = Visible(),
    backend: str = "torch",
) -> Tensor:
    """Causal attention in which each head has a sink: one more logit in the softmax, with no value behind it.

    `out = softmax([q k^T * scale, sink])[..., :-1] v` (GPT-OSS model card, arXiv:2508.10925, section 2.2).

    Args:
        q: queries, [batch, num_heads, q_len, head_dim].
        k: keys, [batch, num_kv_heads, kv_len, head_dim]; `num_heads` is a multiple of `num_kv_heads`.
        v: values, like the keys.
        sinks: [num_heads], any floating dtype.
        scale: what the logits are multiplied with.
        window: how many keys a query sees, itself included; None sees all.
        visible: padding, packed sequences, the place of the queries among the keys, or a mask of your own.
        backend: the name of one of `BACKENDS`.

    Returns:
        [batch, num_heads, q_len, head_dim], in q's dtype; differentiable in q, k, v and sinks.

    Raises:
        ValueError: shapes or dtypes that do not go together.

    Example:
        >>> q, k, v = torch.randn(1, 8, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
        >>> attention(q, k, v, torch.zeros(8), scale=0.25, window=3).shape
        torch.Size([1, 8, 5, 16])
    """
    _check(q, k, v, sinks, visible, window)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # The products are what autocast lowers; a rotary embedding in float32 leaves q and k in another dtype than v.
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"attention takes q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}.")
    rules = Rules(scale, window, visible)
    if backend == "reference":
        return reference_attention(q, k, v, sinks, rules)
    if backend not in KERNELS:
        raise ValueError(
            f"attention has no backend {backend!r}. Use one of {', '.join(map(repr, KERNELS))}, 'reference'."
        )
    _check_derivatives(visible)
    # The kernels read rows: their last dim must be contiguous, and no one below checks.
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    if torch.is_grad_enabled() or is_traced(q, k, v, sinks):
        return sink_attention(q, k, v, sinks, *visible, scale, window, backend)[0]
    # The operator is for autograd and tracing; without either, a decode step need not pay for it.
    return KERNELS[backend](q).forward(q, k, v, sinks, rules)[0]


def _check_derivatives(visible: Visible) -> None:
    """Refuse the derivatives that only the reference has, which would silently be zero."""
    if visible.mask is not None and visible.mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "the attention mask requires a gradient, and no flash kernel here has one. Use backend='reference', or "
            "give mask.detach()."
        )
    # Of vmap alone torch makes a loop.
    transforms.refuse("flash attention", transforms.active() - {"vmap"})


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Visible, window: int | None) -> None:
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0]):
        raise ValueError(f"attention takes q, k, v [batch, heads, len, head_dim], not {[*map(_shape, (q, k, v))]}.")
    if not q.shape[1] or not k.shape[1] or not q.shape[3]:
        raise ValueError(f"attention needs at least one head and one dim: q is {_shape(q)}, k is {_shape(k)}.")
    if k.shape[3] != q.shape[3] or v.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {_shape(q)} does not go with k {_shape(k)} and v {_shape(v)}: head_dim or heads differ.")
    if sinks.shape != q.shape[1:2]:
        raise ValueError(f"one sink per query head: expected [{q.shape[1]}], got {_shape(sinks)}.")
    if visible.q_start is None and visible.mask is None and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries but only {k.shape[2]} keys: each query needs its own key.")
    if window is not None and window < 1:
        raise ValueError(f"window counts the query's own key, so it is at least 1, not {window}.")
    for name, tensor, shape in (
        ("keys", visible.keys, (q.shape[0], k.shape[2])),
        ("starts", visible.starts, (q.shape[0], q.shape[2])),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"visible.{name} is {_shape(tensor)}, expected {list(shape)}.")
    if visible.keys is not None and visible.keys.dtype != torch.bool:
        raise ValueError(f"visible.keys is bool, not {visible.keys.dtype}.")
    if (mask := visible.mask) is not None:
        fits = mask.ndim == 4 and mask.shape[0] in (1, q.shape[0]) and mask.shape[1] in (1, q.shape[1])
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"an attention mask is bool (True: may see) or floating point, which is added to the logits, and not "
                f"{mask.dtype}. Of zeros and ones give mask.bool()."
            )
        if not fits or mask.shape[2:] != (q.shape[2], k.shape[2]):
            raise ValueError(
                f"an attention mask for {q.shape[2]} queries and {k.shape[2]} keys is [batch or 1, heads or 1, "
                f"{q.shape[2]}, {k.shape[2]}], not {_shape(mask)}."
            )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
