"""Decoder layers of a GPT-OSS model in three native calls, for one token of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssExperts, GptOssMLP

from ..core.journal import Around, ClassForward, Journal
from ..kernels.decoder_layer import LayerSizes, LayerWeights, NativeLayer
from ..kernels.direct import is_direct
from ..kernels.kernel_table import LINEARS, PACKED_EXPERTS, ranges
from .attention import FORWARD as ATTENTION
from .attention import KEY as ATTENTION_KEY
from .attention import is_transformers, natively_rotated
from .changes import ADAPTERS
from .experts import KEY as EXPERTS_KEY
from .linears import LINEAR, NORM, ROUTER, few_rows_faster, few_rows_routed, most_probable, natively_normed
from .modules import WRAPPED, is_plain, own_forward

Forward = Callable[..., Any]
CALL = nn.Module.__call__
LAYER = own_forward(GptOssDecoderLayer)


class Parts(NamedTuple):
    """The parts of a layer."""

    input_norm: Any
    attention: Any
    q: Any
    k: Any
    v: Any
    o: Any
    post_norm: Any
    mlp: Any
    router: Any
    experts: Any


NATIVE_PARTS = Parts(
    input_norm=(NORM, natively_normed),
    attention=(ATTENTION, natively_rotated),
    q=(LINEAR, few_rows_faster),
    k=(LINEAR, few_rows_faster),
    v=(LINEAR, few_rows_faster),
    o=(LINEAR, few_rows_faster),
    post_norm=(NORM, natively_normed),
    mlp=(own_forward(GptOssMLP), None),
    router=(ROUTER, few_rows_routed),
    experts=(own_forward(GptOssExperts), None),
)
"""Of each part: the forward of its class, and what lies around it if the part is native."""

OUR_ATTENTION, OUR_EXPERTS = ATTENTION_KEY.format("native"), EXPERTS_KEY.format("native")
REGISTERED = ALL_ATTENTION_FUNCTIONS[OUR_ATTENTION], ALL_EXPERTS_FUNCTIONS[OUR_EXPERTS]


class Found:
    """A layer as the library knows it, once it was looked for. A copy of the model looks for its own."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.native: NativeLayer | None = None
        self.max_rows = 0

    def __reduce__(self) -> tuple[type[Found], tuple[()]]:
        return Found, ()


def set_layers(model: nn.Module, journal: Journal) -> Iterator[str]:
    """Let layers take one token of each sequence in three native calls; says what was changed, in a sentence."""
    paths = [path for path, module in model.named_modules() if type(module).forward is LAYER]
    for path in paths:
        journal.around(model, path, natively_stepped, Found())
    if paths:
        yield f"layers ({len(paths)}): three native calls to decode, where attention and packed experts are native too"


def natively_stepped(found: Found, layer: Any, inner: Callable[..., Tensor], /, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer's forward: in three native calls where each of its parts would be native by itself."""
    native = _native(found, layer, inner, *args, **kwargs) if len(args) == 1 else None
    if native is None:
        return inner(*args, **kwargs)
    (x,), cache = args, kwargs.get("past_key_values")
    q, keys, values = native.before(x, *kwargs["position_embeddings"])
    if cache is not None:
        keys, values = cache.update(keys, values, layer.self_attn.layer_idx)
    total, normed, logits = native.between(x, q, keys, values)
    routing_weights, indices = most_probable(logits, native.sizes.top_k)
    return native.after(total, normed, indices, routing_weights)


def _native(
    found: Found,
    layer: Any,
    inner: Callable[..., Tensor],
    x: Tensor,
    /,
    *,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    cache: Any = None,
    **_: Any,
) -> NativeLayer | None:
    """What computes these, or None where it is not one token of each sequence, or not all parts are native."""
    if attention_mask is not None or cache is not None or position_embeddings is None or torch.is_grad_enabled():
        return None
    if x.dim() != 3 or x.shape[1] != 1 or not (past_key_values is None or type(past_key_values) is DynamicCache):
        return None
    if LAYER is None or not is_plain(layer, inner, LAYER):
        return None
    if torch_module._has_any_global_hook() or not is_transformers():
        return None
    cos, sin = position_embeddings
    if not is_direct(x, cos, sin) or not x.is_contiguous() or (parts := _parts(layer)) is None:
        return None
    with torch._C.DisableTorchFunctionSubclass():  # of a packed weight each look would be a call of `Codes`
        weights, sizes = _weights(parts), _sizes(parts)
        native = found.native
        if native is None or not native.reads(weights, sizes):
            found.native = native = _looked_at(found, weights, sizes)
    if native is None:
        return None
    fits = x.dtype == native.dtype and x.shape[2] == native.hidden and 0 < len(x) <= found.max_rows
    angles = (1, native.sizes.head_dim // 2)
    fits = fits and cos.shape == sin.shape and cos.shape[1:] == angles and len(cos) in (1, len(x))
    return native if fits else None


def _parts(layer: Any) -> Parts | None:
    """The parts of a layer; None unless each of them would be native by itself."""
    own = layer._modules
    attention, mlp = own.get("self_attn"), own.get("mlp")
    if attention is None or mlp is None:
        return None
    of_attention, of_mlp = attention._modules, mlp._modules
    parts = Parts(
        input_norm=own.get("input_layernorm"),
        attention=attention,
        q=of_attention.get("q_proj"),
        k=of_attention.get("k_proj"),
        v=of_attention.get("v_proj"),
        o=of_attention.get("o_proj"),
        post_norm=own.get("post_attention_layernorm"),
        mlp=mlp,
        router=of_mlp.get("router"),
        experts=of_mlp.get("experts"),
    )
    for part, (forward, function) in zip(parts, NATIVE_PARTS, strict=True):
        if part is None or part.__class__.forward is not forward or part.__class__.__call__ is not CALL:
            return None
        has = part.__dict__
        if has["training"] or has["_forward_hooks"] or has["_forward_pre_hooks"]:
            return None
        around = has.get("forward")
        if function is None:
            if around is not None:
                return None
        elif (
            around.__class__ is not Around
            or around.function is not function
            or around.inner.__class__ is not ClassForward
        ):
            return None
    experts = parts.experts
    ours = WRAPPED in attention.__dict__ and attention.config._attn_implementation == OUR_ATTENTION
    ours = ours and WRAPPED in experts.__dict__ and experts.config._experts_implementation == OUR_EXPERTS
    registered = ALL_ATTENTION_FUNCTIONS[OUR_ATTENTION], ALL_EXPERTS_FUNCTIONS[OUR_EXPERTS]
    return parts if ours and registered == REGISTERED and ADAPTERS not in experts.__dict__ else None


def _weights(parts: Parts) -> LayerWeights:
    """What the parts hold; None for what they lack, or compute from something else."""
    of_experts = parts.experts._parameters.get
    return LayerWeights(
        input_norm=parts.input_norm._parameters.get("weight"),
        q=parts.q._parameters.get("weight"),
        q_bias=parts.q._parameters.get("bias"),
        k=parts.k._parameters.get("weight"),
        k_bias=parts.k._parameters.get("bias"),
        v=parts.v._parameters.get("weight"),
        v_bias=parts.v._parameters.get("bias"),
        sinks=parts.attention._parameters.get("sinks"),
        o=parts.o._parameters.get("weight"),
        o_bias=parts.o._parameters.get("bias"),
        post_norm=parts.post_norm._parameters.get("weight"),
        router=parts.router._parameters.get("weight"),
        router_bias=parts.router._parameters.get("bias"),
        gate_up_blocks=of_experts("gate_up_proj_blocks"),
        gate_up_scales=of_experts("gate_up_proj_scales"),
        gate_up_bias=of_experts("gate_up_proj_bias"),
        down_blocks=of_experts("down_proj_blocks"),
        down_scales=of_experts("down_proj_scales"),
        down_bias=of_experts("down_proj_bias"),
    )


def _sizes(parts: Parts) -> LayerSizes:
    """What the parts compute now."""
    attention, experts = parts.attention.__dict__, parts.experts.__dict__
    return LayerSizes(
        head_dim=attention.get("head_dim"),
        top_k=parts.router.__dict__.get("top_k"),
        window=attention.get("sliding_window"),
        scale=attention.get("scaling"),
        input_eps=parts.input_norm.__dict__.get("variance_epsilon"),
        post_eps=parts.post_norm.__dict__.get("variance_epsilon"),
        alpha=experts.get("alpha"),
        limit=experts.get("limit"),
    )


def _looked_at(found: Found, weights: LayerWeights, sizes: LayerSizes) -> NativeLayer | None:
    """The layer, if it can be native; and up to how many rows that is faster."""
    named = sizes._asdict().items()
    if not all(type(size) in (int, float) or (size is None and name == "window") for name, size in named):
        return None  # such as a tensor, which may change in place
    try:
        native = NativeLayer(weights, sizes)
    except ValueError:
        return None  # part by part it works, or says what is wrong
    first = [ranges(projection, native.dtype)[0] for projection in (*LINEARS[:5], PACKED_EXPERTS)]
    everywhere = all(kernel == "native" for _, kernel in first)
    found.max_rows = min(2**31 if most is None else most for most, _ in first) if everywhere else 0
    return native
