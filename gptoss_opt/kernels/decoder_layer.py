"""A decoder layer for one token of each sequence, in three calls of the native library.

By itself each part of a layer is a call from Python, and a step of decoding has hundreds: a tenth of its time. In
between the caller keeps keys and values, and chooses experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .native import BFLOAT16, DTYPES, LayerArguments, Matrices, library


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The weights of one layer, all in one dtype but packed ones, contiguous and on the CPU.

    Attributes:
        norms: of the input, and after attention: `[hidden]` each.
        attention: weights `[out, in]` of q, k, v and o, and the sinks `[heads]`.
        attention_biases: of q, k, v and o.
        router: `[num_experts, hidden]` and its bias.
        experts: for gate and up, then down: blocks and scales as released, and the bias; uint8, uint8 and the dtype.
    """

    norms: tuple[Tensor, Tensor]
    attention: tuple[Tensor, ...]
    attention_biases: tuple[Tensor | None, ...]
    router: tuple[Tensor, Tensor]
    experts: tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

    @property
    def plain(self) -> tuple[Tensor, ...]:
        """All that are in the dtype of the layer."""
        biases = (bias for bias in self.attention_biases if bias is not None)
        return (*self.norms, *self.attention, *biases, *self.router, *(bias for *_, bias in self.experts))

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """All that are packed."""
        return tuple(tensor for *packed, _ in self.experts for tensor in packed)


class LayerSizes(NamedTuple):
    """What a layer computes, besides its weights. `window` is 0 where attention sees all keys."""

    head_dim: int
    top_k: int
    window: int
    scale: float
    eps: tuple[float, float]
    alpha: float
    limit: float


class NativeLayer:
    """A layer whose weights the library knows the addresses of."""

    def __init__(self, weights: LayerWeights, sizes: LayerSizes) -> None:
        """Read the addresses; `why_not` has found nothing against it."""
        (q, k, _, _, _), (router, _) = weights.attention, weights.router
        self.dtype, self.hidden = q.dtype, q.shape[1]
        self.heads, self.kv_heads, self.head_dim = len(q) // sizes.head_dim, len(k) // sizes.head_dim, sizes.head_dim
        self.num_experts, self.top_k = len(router), sizes.top_k
        self._weights = weights  # they stay alive as long as their addresses are held
        *projections, sinks = weights.attention
        both = zip(projections, weights.attention_biases, strict=True)
        pairs = [None if tensor is None else tensor.data_ptr() for pair in both for tensor in pair]
        self._arguments = LayerArguments(
            weights.norms[0].data_ptr(),
            *pairs[:6],
            sinks.data_ptr(),
            *pairs[6:],
            weights.norms[1].data_ptr(),
            *map(Tensor.data_ptr, weights.router),
            *map(_matrices, weights.experts),
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.num_experts,
            sizes.top_k,
            sizes.window,
            *sizes.eps,
            sizes.scale,
            sizes.alpha,
            sizes.limit,
            self.dtype == torch.bfloat16,
        )

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, 1, hidden] and the angles [B or 1, 1, head_dim / 2] to q, k and v [B, heads, 1, head_dim], rotated."""
        functions, best, parallel = library()
        rows = len(x)
        q = x.new_empty(rows, self.heads, 1, self.head_dim)
        k, v = (x.new_empty(rows, self.kv_heads, 1, self.head_dim) for _ in range(2))
        angles = 0 if len(cos) == 1 else self.head_dim // 2
        there = map(Tensor.data_ptr, (x, cos, sin, q, k, v))
        _check(
            functions.gptoss_layer_before(
                best, self._arguments, *there, rows, angles, parallel, torch.get_num_threads()
            )
        )
        return q, k, v

    def between(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention on keys and values [B, kv_heads, S, head_dim]: x and its output, that normed, and router logits."""
        functions, best, parallel = library()
        rows, num_keys = len(x), keys.shape[2]
        total, normed, logits = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, self.num_experts)
        there = map(Tensor.data_ptr, (x, q, keys, values, total, normed, logits))
        _check(
            functions.gptoss_layer_between(
                best, self._arguments, *there, rows, num_keys, parallel, torch.get_num_threads()
            )
        )
        return total, normed, logits

    def after(self, total: Tensor, normed: Tensor, indices: Tensor, routing_weights: Tensor) -> Tensor:
        """`total` and what the experts `indices` [B, K], int64, give for `normed`, weighted: [B, 1, hidden]."""
        functions, best, parallel = library()
        out = torch.empty_like(total)
        there = map(Tensor.data_ptr, (total, normed, indices, routing_weights, out))
        _check(functions.gptoss_layer_after(best, self._arguments, *there, len(out), parallel, torch.get_num_threads()))
        return out


def why_not(weights: LayerWeights, sizes: LayerSizes) -> str | None:
    """What stands in the way of `NativeLayer` for these weights, or None."""
    dtype, (router, _) = weights.norms[0].dtype, weights.router
    if dtype not in DTYPES or (dtype == torch.bfloat16 and library().best < BFLOAT16):
        return f"the dtype is {dtype}"
    for tensors, wanted in ((weights.plain, dtype), (weights.packed, torch.uint8)):
        for tensor in tensors:
            if not (tensor.is_cpu and tensor.dtype == wanted and tensor.is_contiguous() and tensor.data_ptr()):
                return f"a weight is {tensor.dtype} on {tensor.device}, not contiguous, or has no values"
            if tensor.is_neg() or tensor.layout != torch.strided:
                return "a weight is a view that negates, or sparse"
    q, k, v, o, sinks = weights.attention
    (hidden,), dim = weights.norms[0].shape, sizes.head_dim
    num_experts, inner = len(router), weights.experts[1][1].shape[-1] * 32
    shapes = {
        "q_proj": (q.shape, (len(sinks) * dim, hidden)),
        "k_proj": (k.shape, (len(k) // dim * dim, hidden)),
        "v_proj": (v.shape, k.shape),
        "o_proj": (o.shape, (hidden, len(q))),
        "the norm": (weights.norms[1].shape, (hidden,)),
        "the router": (router.shape, (num_experts, hidden)),
        "the router's bias": (weights.router[1].shape, (num_experts,)),
    }
    for bias, weight in zip(weights.attention_biases, (q, k, v, o), strict=True):
        if bias is not None and bias.shape != weight.shape[:1]:
            return "a bias has another length than its weight"
    for name, (blocks, scales, bias), width, length in (
        ("gate_up_proj", weights.experts[0], 2 * inner, hidden),
        ("down_proj", weights.experts[1], hidden, inner),
    ):
        shapes[f"{name}_blocks"] = blocks.shape, (num_experts, width, length // 32, 16)
        shapes[f"{name}_scales"] = scales.shape, (num_experts, width, length // 32)
        shapes[f"{name}_bias"] = bias.shape, (num_experts, width)
    odd = [name for name, (found, wanted) in shapes.items() if tuple(found) != tuple(wanted)]
    if odd or hidden % 32 or dim % 16 or not len(k) or len(sinks) % (len(k) // dim):
        return f"sizes do not fit: {', '.join(odd)}"
    return None


def _matrices(packed: tuple[Tensor, Tensor, Tensor]) -> Matrices:
    blocks, scales, _ = packed
    return Matrices(*map(Tensor.data_ptr, packed), blocks.shape[1], scales.shape[2] * 32)


def _check(status: int) -> None:
    if status:
        raise MemoryError("the native kernel found no memory for its scratch space.")
