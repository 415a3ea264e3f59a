"""A decoder layer for one token of each sequence, in three calls of the native library.

By itself each part of a layer is a call from Python, and a step of decoding has hundreds: a tenth of its time. In
between the caller keeps keys and values, and chooses experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gate import PLAIN, admit
from .mxfp4 import BLOCK
from .native import BFLOAT16, DTYPES, LANES, LayerArguments, Matrices, check_memory, library


class LayerWeights(NamedTuple):
    """The weights of a layer, in the order of layer.h; all but packed ones in one dtype, contiguous and on the CPU.

    Norms are `[hidden]`; q, k, v, o and the router `[out, in]`; sinks `[heads]`; blocks and scales as released.
    """

    input_norm: Tensor | None
    q: Tensor | None
    q_bias: Tensor | None
    k: Tensor | None
    k_bias: Tensor | None
    v: Tensor | None
    v_bias: Tensor | None
    sinks: Tensor | None
    o: Tensor | None
    o_bias: Tensor | None
    post_norm: Tensor | None
    router: Tensor | None
    router_bias: Tensor | None
    gate_up_blocks: Tensor | None
    gate_up_scales: Tensor | None
    gate_up_bias: Tensor | None
    down_blocks: Tensor | None
    down_scales: Tensor | None
    down_bias: Tensor | None


OPTIONAL = ("q_bias", "k_bias", "v_bias", "o_bias", "router_bias", "gate_up_bias", "down_bias")
PACKED = ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")


class LayerSizes(NamedTuple):
    """What a layer computes, besides its weights. `window` is None where attention sees all keys."""

    head_dim: int
    top_k: int
    window: int | None
    scale: float
    input_eps: float
    post_eps: float
    alpha: float
    limit: float


class NativeLayer:
    """A layer whose weights the library has the addresses of. It keeps no weights: see `reads`."""

    def __init__(self, weights: LayerWeights, sizes: LayerSizes) -> None:
        """Look at the weights. Raises `ValueError` where they do not go together."""
        self.sizes, self.dtype, shapes = sizes, *_checked(weights, sizes)
        self.hidden, self.num_experts = shapes["o"][0], shapes["router"][0]
        self.heads, self.kv_heads = (shapes[name][0] // sizes.head_dim for name in ("q", "k"))
        self._facts = [None if one is None else (one.data_ptr(), one.dtype, one.shape) for one in weights]
        there = [None if one is None else one.data_ptr() for one in weights]
        matrices = (
            Matrices(*there[first : first + 3], shapes[name][1], shapes[name][2] * BLOCK)
            for first, name in ((13, "gate_up_scales"), (16, "down_scales"))
        )
        self._arguments = LayerArguments(
            *there[:13],
            *matrices,
            self.hidden,
            self.heads,
            self.kv_heads,
            sizes.head_dim,
            self.num_experts,
            sizes.top_k,
            sizes.window or 0,
            sizes.input_eps,
            sizes.post_eps,
            sizes.scale,
            sizes.alpha,
            sizes.limit,
            self.dtype == torch.bfloat16,
        )

    def reads(self, weights: LayerWeights, sizes: LayerSizes) -> bool:
        """Whether these are what it was made of: weights that lie where they lay, in the same shapes."""
        for tensor, facts in zip(weights, self._facts, strict=True):
            if tensor is None or facts is None:
                if (tensor is None) != (facts is None):
                    return False
            elif (
                (tensor.data_ptr(), tensor.dtype, tensor.shape) != facts
                or type(tensor) not in PLAIN
                or not tensor.is_contiguous()
                or tensor.is_neg()
            ):
                return False
        return sizes == self.sizes

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, 1, hidden] and the angles [B or 1, 1, head_dim / 2] to q, k and v [B, heads, 1, head_dim], rotated."""
        functions, best, parallel = library()
        rows, dim = len(x), self.sizes.head_dim
        q = x.new_empty(rows, self.heads, 1, dim)
        k, v = x.new_empty(rows, self.kv_heads, 1, dim), x.new_empty(rows, self.kv_heads, 1, dim)
        there = map(Tensor.data_ptr, (x, cos, sin, q, k, v))
        angles = 0 if len(cos) == 1 else dim // 2
        num_threads = torch.get_num_threads()
        status = functions.gptoss_layer_before(best, self._arguments, *there, rows, angles, parallel, num_threads)
        check_memory(status)
        return q, k, v

    def between(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention on keys and values [B, kv_heads, S, head_dim]: x and its output, that normed, and router logits.

        Raises `ValueError` for keys and values that are something else, as a cache may give them.
        """
        functions, best, parallel = library()
        rows, num_keys = len(x), keys.shape[2]
        keys = admit("keys", keys, self.dtype, (rows, self.kv_heads, num_keys, self.sizes.head_dim))
        values = admit("values", values, self.dtype, keys.shape)
        total, normed, logits = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, self.num_experts)
        there = map(Tensor.data_ptr, (x, q, keys, values, total, normed, logits))
        num_threads = torch.get_num_threads()
        check_memory(
            functions.gptoss_layer_between(best, self._arguments, *there, rows, num_keys, parallel, num_threads)
        )
        return total, normed, logits

    def after(self, total: Tensor, normed: Tensor, indices: Tensor, routing_weights: Tensor) -> Tensor:
        """`total` and what the experts `indices` [B, K], int64, give for `normed`, weighted: [B, 1, hidden]."""
        functions, best, parallel = library()
        out = torch.empty_like(total)
        there = map(Tensor.data_ptr, (total, normed, indices, routing_weights, out))
        check_memory(
            functions.gptoss_layer_after(best, self._arguments, *there, len(out), parallel, torch.get_num_threads())
        )
        return out


def _checked(weights: LayerWeights, sizes: LayerSizes) -> tuple[torch.dtype, dict[str, tuple[int, ...]]]:
    """The dtype of a layer and the shapes of its weights, all of which are looked at."""
    if weights.input_norm is None or weights.input_norm.dtype not in DTYPES:
        raise ValueError(f"a native layer is in one of {DTYPES}.")
    dtype = weights.input_norm.dtype
    if dtype == torch.bfloat16 and library().best < BFLOAT16:
        raise ValueError("a native layer in bfloat16 needs a CPU that multiplies bfloat16.")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in zip(LayerWeights._fields, weights, strict=True):
        if tensor is not None:
            wanted = torch.uint8 if name in PACKED else dtype
            shapes[name] = tuple(admit(name, tensor, wanted, tensor.shape, strided=False).shape)
        elif name not in OPTIONAL:
            raise ValueError(f"a native layer needs {name}.")
    _check_shapes(shapes, sizes)
    return dtype, shapes


def _check_shapes(shapes: dict[str, tuple[int, ...]], sizes: LayerSizes) -> None:
    for name, dims in {"input_norm": 1, "sinks": 1, "k": 2, "router": 2, "down_scales": 3}.items():
        if len(shapes[name]) != dims:
            raise ValueError(f"{name} is {list(shapes[name])}, and should have {dims} dims.")
    (hidden,), (heads,), num_experts = shapes["input_norm"], shapes["sinks"], shapes["router"][0]
    dim, inner = sizes.head_dim, shapes["down_scales"][2] * BLOCK
    kv_heads = shapes["k"][0] // dim
    outs = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim, "o": hidden, "router": num_experts}
    wanted: dict[str, tuple[int, ...]] = {name: (out, hidden) for name, out in outs.items()}
    wanted |= {"o": (hidden, heads * dim), "post_norm": (hidden,)}
    wanted |= {f"{name}_bias": (out,) for name, out in outs.items()}
    for name, out, length in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        scales = (num_experts, out, length // BLOCK)
        wanted |= {f"{name}_scales": scales, f"{name}_blocks": (*scales, BLOCK // 2), f"{name}_bias": scales[:2]}
    for name, shape in wanted.items():
        if name in shapes and shapes[name] != shape:
            raise ValueError(f"{name} is {list(shapes[name])}, and should be {list(shape)}.")
    if hidden % BLOCK or dim % LANES or not kv_heads or heads % kv_heads:
        raise ValueError(f"a native layer has no hidden size {hidden} with {heads} and {kv_heads} heads of {dim}.")
    if sizes.top_k > num_experts or sizes.top_k < 1 or (sizes.window is not None and sizes.window < 1):
        raise ValueError(f"a native layer has no {sizes.top_k} of {num_experts} experts and window {sizes.window}.")
