"""Decoder layers of a GPT-OSS model in three native calls, for one token of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssExperts, GptOssMLP

from ..core.journal import Around, ClassForward, Journal
from ..kernels.decoder_layer import LayerSizes, LayerWeights, NativeLayer, why_not
from ..kernels.direct import is_direct
from ..kernels.which import LINEARS, PACKED_EXPERTS, ranges
from .attention import FORWARD as ATTENTION
from .attention import KEY as ATTENTION_KEY
from .attention import is_transformers, natively_rotated
from .changes import ADAPTERS
from .experts import KEY as EXPERTS_KEY
from .linears import LINEAR, NORM, ROUTER, few_rows_faster, few_rows_routed, most_probable, natively_normed
from .modules import WRAPPED, is_plain

Forward = Callable[..., Any]
LAYER: Forward = GptOssDecoderLayer.forward
MLP: Forward = GptOssMLP.forward
EXPERTS: Forward = GptOssExperts.forward
"""The forwards of which the native layer computes the same function."""

PARTS: tuple[tuple[str, Forward, Forward | None], ...] = (
    ("input_layernorm", NORM, natively_normed),
    ("self_attn", ATTENTION, natively_rotated),
    *((f"self_attn.{name}", LINEAR, few_rows_faster) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("post_attention_layernorm", NORM, natively_normed),
    ("mlp", MLP, None),
    ("mlp.router", ROUTER, few_rows_routed),
    ("mlp.experts", EXPERTS, None),
)
"""The parts of a layer, the forward of each one's class, and what lies around it when all of them are native."""


class Part(NamedTuple):
    """A part of a layer as it was found.

    Attributes:
        module: the part; `attributes` are its own, and `parameters` those among them.
        forward: the forward of its class.
        around: its own forward, if it has one.
    """

    module: nn.Module
    attributes: dict[str, Any]
    parameters: dict[str, Any]
    forward: Forward
    around: Any


class Step(NamedTuple):
    """A layer that is ready.

    Attributes:
        parts: the parts that it has.
        weights: where each weight was found, under which name, what it was, and its address.
        settings: what `_settings` said.
        native: what computes.
        max_rows: up to how many rows that is faster.
    """

    parts: tuple[Part, ...]
    weights: tuple[tuple[dict[str, Any], str, Tensor, int], ...]
    settings: tuple[Any, ...]
    native: NativeLayer
    max_rows: int


class Found:
    """The step of a layer, once it was found. A copy of the model, and another process, look for their own."""

    step: Step | None = None

    def __reduce__(self) -> tuple[type[Found], tuple[()]]:
        return Found, ()


def set_layers(model: nn.Module, journal: Journal) -> Iterator[str]:
    """Let layers take one token of each sequence in three native calls; says what was changed, in a sentence."""
    paths = [path for path, module in model.named_modules() if type(module).forward is LAYER]
    for path in paths:
        journal.around(model, path, natively_stepped, Found())
    if paths:
        yield f"layers ({len(paths)}): three native calls to decode, where attention and packed experts are native too"


def natively_stepped(
    found: Found, layer: Any, inner: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A decoder layer's forward: in three native calls where each of its parts would be native by itself."""
    step = None if args else _step(found, layer, inner, hidden_states, **kwargs)
    if step is None:
        return inner(hidden_states, *args, **kwargs)
    native, cache = step.native, kwargs.get("past_key_values")
    q, keys, values = native.before(hidden_states, *kwargs["position_embeddings"])
    if cache is not None:
        keys, values = cache.update(keys, values, layer.self_attn.layer_idx)
    total, normed, logits = native.between(hidden_states, q, keys.contiguous(), values.contiguous())
    routing_weights, indices = most_probable(logits, native.top_k)
    return native.after(total, normed, indices, routing_weights)


def _step(
    found: Found,
    layer: Any,
    inner: Callable[..., Tensor],
    x: Tensor,
    *,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    cache: Any = None,
    **_: Any,
) -> Step | None:
    """What computes these, or None where it is not one token of each sequence, or not all parts are native."""
    if attention_mask is not None or cache is not None or position_embeddings is None or torch.is_grad_enabled():
        return None
    if x.dim() != 3 or x.shape[1] != 1 or not (past_key_values is None or type(past_key_values) is DynamicCache):
        return None
    if not is_plain(layer, inner, LAYER) or torch_module._has_any_global_hook() or not is_transformers():
        return None
    cos, sin = position_embeddings
    if not is_direct(x) or not all(type(angle) is Tensor and angle.is_cpu for angle in (cos, sin)):
        return None
    if not (x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        return None
    step = found.step
    with torch._C.DisableTorchFunctionSubclass():  # of a packed weight each look would be a call of `Codes`
        if step is None or not _is_current(step):
            step = found.step = _prepared(layer)
    if step is None:
        return None
    native, rows = step.native, len(x)
    fits = x.dtype == cos.dtype == sin.dtype == native.dtype and x.shape[2] == native.hidden
    angles = (1, native.head_dim // 2)
    fits = fits and cos.shape == sin.shape and cos.shape[1:] == angles and len(cos) in (1, rows)
    return step if fits and 0 < rows <= step.max_rows else None


def _is_current(step: Step) -> bool:
    """Whether a layer still has the parts, the weights and the settings that were found. In the time of every step."""
    for module, attributes, parameters, forward, around in step.parts:
        if (
            attributes.get("forward") is not around
            or attributes["_parameters"] is not parameters
            or module.__class__.forward is not forward
            or attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["training"]
        ):
            return False
    for parameters, name, tensor, address in step.weights:
        if parameters.get(name) is not tensor or tensor.data_ptr() != address:
            return False
    return _settings(step.parts) == step.settings


def _settings(parts: tuple[Part, ...]) -> tuple[Any, ...]:
    """What the parts compute, besides their weights, and whether it is our backends that do."""
    input_norm, attention, post_norm, router, experts = (parts[i].attributes for i in (0, 1, 6, 8, 9))
    return (
        attention["config"]._attn_implementation,
        attention.get(WRAPPED),
        attention["head_dim"],
        attention["sliding_window"],
        attention["scaling"],
        input_norm["variance_epsilon"],
        post_norm["variance_epsilon"],
        router["top_k"],
        experts["config"]._experts_implementation,
        experts.get(WRAPPED),
        experts["alpha"],
        experts["limit"],
        ADAPTERS in experts,
    )


NATIVE = (ATTENTION_KEY.format("native"), True, EXPERTS_KEY.format("native"), True)


def _prepared(layer: Any) -> Step | None:
    """The step of a layer, or None if one of its parts would not be native by itself."""
    parts: list[Part] = []
    for path, forward, function in PARTS:
        module = layer.get_submodule(path)
        around = module.__dict__.get("forward")
        if type(module).forward is not forward or module.training or module._forward_hooks or module._forward_pre_hooks:
            return None
        if (around is None) != (function is None) or (around is not None and not _is_only(around, function)):
            return None
        parts.append(Part(module, module.__dict__, module._parameters, forward, around))
    settings = _settings(tuple(parts))
    attention, attends, head_dim, window, scale, *eps, top_k, experts, mixes, alpha, limit, adapted = settings
    if adapted or (attention, attends, experts, mixes) != NATIVE or not _has_packed(layer.mlp.experts):
        return None
    sizes = LayerSizes(head_dim, top_k, window or 0, scale, (eps[0], eps[1]), alpha, limit)
    weights = _weights(layer)
    owners = {id(tensor): (part.parameters, name) for part in parts for name, tensor in part.parameters.items()}
    named = [(owners.get(id(tensor)), tensor) for tensor in (*weights.plain, *weights.packed)]
    held = [(*owner, tensor, tensor.data_ptr()) for owner, tensor in named if owner is not None]
    if len(held) < len(named) or why_not(weights, sizes) is not None:
        return None  # such as weights that are computed from others
    dtype = weights.norms[0].dtype
    first = [ranges(projection, dtype)[0] for projection in (*LINEARS[:5], PACKED_EXPERTS)]
    max_rows = 0 if any(kernel != "native" for _, kernel in first) else min(most or 2**31 for most, _ in first)
    return Step(tuple(parts), tuple(held), settings, NativeLayer(weights, sizes), max_rows)


def _is_only(around: Any, function: Any) -> bool:
    """Whether a module's own forward is this function, right around that of its class."""
    return isinstance(around, Around) and around.function is function and isinstance(around.inner, ClassForward)


def _has_packed(experts: Any) -> bool:
    """Whether the experts are packed, and whole on this rank."""
    names = [f"{name}_{part}" for name in ("gate_up_proj", "down_proj") for part in ("blocks", "scales", "bias")]
    return all(experts._parameters.get(name) is not None for name in names)


def _weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    packed = partial(_packed, mlp.experts)
    return LayerWeights(
        (layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
        (*(projection.weight for projection in projections), attention.sinks),
        tuple(projection.bias for projection in projections),
        (mlp.router.weight, mlp.router.bias),
        (packed("gate_up_proj"), packed("down_proj")),
    )


def _packed(experts: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    found = [experts._parameters[f"{name}_{part}"] for part in ("blocks", "scales", "bias")]
    return found[0], found[1], found[2]
