"""`verify`: a probe batch through a wrapped model, and every part of it beside a plain computation of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core import mesh_of
from ..core.record import wrapped_model
from ..kernels.attention import BACKENDS as ATTENTION_BACKENDS
from ..kernels.experts import DENSE_BACKENDS, PACKED_BACKENDS, PackedWeights
from ..model.attention import KEY, attention_request
from ..model.experts import experts_request, weights_held
from ..model.host import GPT_OSS
from ..model.plain import plain_attention, plain_experts, plain_head, plain_norm, plain_rotary, plain_router
from .drift import Drift, epsilon, share_of
from .probe import (
    Call,
    Calls,
    Plain,
    first_tensor,
    implementation,
    in_eval,
    recording,
    run_in_steps,
    run_whole,
)
from .report import Verification

STEPS = 3
PADDING = 5
"""How many tokens are decoded on a cache, and how many of the second row are padding."""
MAX_TOKENS = 512
MAX_DEFAULT = 448
"""The most tokens of a row, and of a row that is made here."""
SAME_DECODING = 1e-6
"""How far logits may be when the same steps run without anybody listening, if not a rounding: a part of their norm."""


def verify(
    model: Any, against: str = "eager", tokens: Tensor | None = None, *, gradients: bool = False
) -> Verification:
    """Compare every part of a wrapped model with a plain eager computation of its weights, on a batch of tokens.

    A self-test for your model on your machine: norms, attention, router and experts of every layer, the rotary
    embedding and the head get what they get in a forward, attention and experts in decoding on a cache too, and what
    they give is compared with plain products in a higher precision. Layers that decode in a few calls must give what
    they give part by part.
    Allowed is a small multiple of the error that plain computations in the model's own dtype have. Every other backend
    that claims to serve here is tried as well. Nothing is changed; adapters are computed as they are, without dropout.

    Args:
        model: a GPT-OSS model in one process, with wrappers or without.
        against: "eager", the only one there is.
        tokens: int64 `[batch, length]`; by default two random rows, longer than the window, one of them padded.
        gradients: whether the gradients of what attention and experts are given are compared too.

    Returns:
        The verdict, and every drift.

    Raises:
        ValueError: another `against`, tokens that are none, or a model that several processes hold together.

    Example:
        >>> found = verify(with_flash_attention(model))
        >>> found.right
        True
        >>> print(found.verdict)
        Right: all ... results are what plain eager computations give, as far as rounding goes; ...
    """
    if against != "eager":
        raise ValueError(f"against is {against!r}. Use 'eager'.")
    inner = _with_head(model)
    if mesh_of(inner) is not None:
        raise ValueError(
            "verify compares what one process holds, and several hold this model together. Verify a smaller model of "
            "the same wrappers on one device, without shard_tensor_parallel and shard_experts."
        )
    # Whatever the caller has switched off: gradients are taken here, and no tensor is one of inference alone.
    with torch.inference_mode(False), torch.no_grad(), in_eval(inner):
        tokens, seen = _probe(inner, tokens)
        drifts = list(_drifts(inner, tokens, seen, gradients))
    dtype = str(inner.dtype).removeprefix("torch.")
    title = f"{type(inner).__name__}, {len(_layers(inner))} layers in {dtype} on {inner.device}"
    return Verification(tuple(drifts), f"{title}: {tokens.shape[0]} rows of {tokens.shape[1]} tokens")


def _with_head(model: Any) -> Any:
    """The GPT-OSS model with a language head, inside whatever is around it. Raises `ValueError` if there is none."""
    inside = wrapped_model(model).modules()
    found = next((one for one in inside if GPT_OSS.why_not(one) is None and hasattr(one, "lm_head")), None)
    if found is None:
        raise ValueError(f"verify takes a GptOssForCausalLM, and this {type(model).__name__} has none inside.")
    if any(hasattr(layer.mlp.experts, "base_layer") for layer in _layers(found)):
        raise ValueError(
            "the experts are adapted by peft (target_parameters), and verify does not know those adapters. Merge them "
            "first (merge_and_unload()), or load them as with_lora's: load_adapter."
        )
    return found


def _layers(model: Any) -> list[Any]:
    return list(model.model.layers)


def _probe(model: Any, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    config = model.config
    if tokens is None:
        window = config.sliding_window or MAX_DEFAULT
        length = min(window + window // 2 + 8, config.max_position_embeddings, MAX_DEFAULT)
        generator = torch.Generator("cpu").manual_seed(0)
        tokens = torch.randint(config.vocab_size, (2, length), generator=generator, device="cpu")
        seen = torch.ones(tokens.shape, dtype=torch.bool, device="cpu")
        seen[1, :PADDING] = False
        return tokens.to(model.device), seen.to(model.device)
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2:
        kind = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens are {kind}. Give a tensor of int64, [batch, length].")
    if not len(tokens) or tokens.shape[1] < STEPS + 2:
        raise ValueError(f"tokens are {list(tokens.shape)}. Give a row at least, of {STEPS + 2} at least.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise ValueError(f"tokens are from {int(tokens.min())} to {int(tokens.max())}, of {config.vocab_size} words.")
    seen = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    if tokens.shape[1] > MAX_TOKENS and tokens.numel() > 4 * MAX_TOKENS:
        raise ValueError(f"tokens are {list(tokens.shape)}, and all scores of attention are written. Give fewer.")
    return tokens.to(model.device), seen.to(model.device)


def _drifts(model: Any, tokens: Tensor, seen: Tensor, gradients: bool) -> Iterator[Drift]:
    layers = _layers(model)
    parts: list[nn.Module] = [
        part for layer in layers for part in (layer.self_attn, layer.mlp.router, layer.mlp.experts)
    ]
    norms: list[nn.Module] = [
        norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    head, rotary, last = model.get_output_embeddings(), model.model.rotary_emb, model.model.norm
    with recording([*parts, *norms, head, rotary, last]) as whole:
        run_whole(model, tokens, seen)
    with recording(parts) as stepped:
        run_in_steps(model, tokens, seen, STEPS)
    # Without padding, and with nobody listening, whole layers are computed in a few calls where that can be.
    everything = torch.ones_like(seen)
    with recording(parts):
        listened = run_in_steps(model, tokens, everything, STEPS)
    alone = run_in_steps(model, tokens, everything, STEPS)
    attention, experts = _backends(model)
    for number, layer in enumerate(tqdm(layers, desc="verifying", unit="layer", delay=1)):
        yield from _attention(number, layer.self_attn, whole, stepped, seen, attention, gradients)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            yield _normed(number, norm, whole)
        yield from _router(number, layer.mlp.router, whole)
        yield from _experts(number, layer.mlp.experts, whole, stepped, experts, gradients)
    call = whole[head][-1]
    plain: Plain = partial(plain_head, model)
    yield _compared("head", None, "the model", "forward", call.out, call.args[0], plain)
    yield _normed(None, last, whole)
    yield _rotated(rotary, whole)
    off = float((alone.double() - listened.double()).norm() / listened.double().norm().clamp(min=1e-30))
    allowed = max(SAME_DECODING, epsilon(model.dtype))
    yield Drift("head", None, "the model as it runs", "decoding", off / allowed, "root mean square")


def _normed(layer: int | None, module: Any, whole: Calls) -> Drift:
    out, hidden = whole[module][-1].out, whole[module][-1].args[0]
    # In float32 whatever the dtype is, as transformers computes it.
    low, exact = plain_norm(module, hidden.float()), plain_norm(module, hidden.double())
    share = share_of(out, low.to(out.dtype), exact, max(epsilon(out.dtype), epsilon(torch.float32)))
    return Drift("norm", layer, "the model", "forward", *share)


def _rotated(module: Any, whole: Calls) -> Drift:
    call = whole[module][-1]
    places = call.args[1] if len(call.args) > 1 else call.kwargs["position_ids"]
    found = torch.cat(call.out, -1)
    low, exact = (plain_rotary(module, places.to(dtype)) for dtype in (torch.float32, torch.float64))
    share = share_of(found, low.to(found.dtype), exact, max(epsilon(found.dtype), epsilon(torch.float32)))
    return Drift("rotary embedding", None, "the model", "forward", *share)


IMPLEMENTATION = {"attention": "_attn_implementation", "experts": "_experts_implementation"}
"""Where a config names what computes a part."""


def _name(config: Any, part: str) -> str:
    """The backend that computes a part now."""
    return str(getattr(config, IMPLEMENTATION[part])).removeprefix(KEY.format(""))


def _backends(model: Any) -> tuple[list[str], list[str]]:
    """The other backends of attention and of experts that serve here, where ours are on the model at all."""
    attention, experts = [], []
    if str(model.config._attn_implementation).startswith(KEY.format("")):
        wanted = attention_request(model)
        attention = [one.name for one in ATTENTION_BACKENDS if one.why_not(wanted) is None]
    if str(model.config._experts_implementation).startswith(KEY.format("")):
        asked = experts_request(model)
        packed = isinstance(weights_held(_layers(model)[0].mlp.experts, "down_proj"), PackedWeights)
        known = PACKED_BACKENDS if packed else DENSE_BACKENDS
        experts = [one.name for one in known if one.why_not(asked) is None]
    return (
        [name for name in attention if name != _name(model.config, "attention")],
        [name for name in experts if name != _name(model.config, "experts")],
    )


def _attention(
    number: int, module: Any, whole: Calls, stepped: Calls, seen: Tensor, others: list[str], gradients: bool
) -> Iterator[Drift]:
    call, name = whole[module][-1], _name(module.config, "attention")

    def plain(places: tuple[Tensor, Tensor], hidden: Tensor) -> Tensor:
        return plain_attention(module, hidden, places, seen)[seen]

    def again(hidden: Tensor) -> Tensor:
        return first_tensor(module(**{**call.kwargs, "hidden_states": hidden}))[seen]

    hidden = call.kwargs["hidden_states"]
    exact = partial(plain, call.kwargs["position_embeddings"])
    yield _compared("attention", number, name, "forward", first_tensor(call.out)[seen], hidden, exact)
    calls = stepped[module]
    together = torch.cat([one.kwargs["hidden_states"] for one in calls], 1)
    places = tuple(
        torch.cat([one.kwargs["position_embeddings"][which].expand(len(seen), -1, -1) for one in calls], 1)
        for which in (0, 1)
    )
    out = torch.cat([first_tensor(one.out) for one in calls], 1)[seen]
    yield _compared("attention", number, name, "decoding", out, together, partial(plain, (places[0], places[1])))
    if gradients:
        yield _differentiated("attention", number, name, again, hidden, exact)
    for other in others:
        with implementation(module.config, IMPLEMENTATION["attention"], KEY.format(other)):
            yield from _by_another("attention", number, other, again, hidden, exact, gradients)


def _by_another(
    part: str, number: int, name: str, ours: Plain, hidden: Tensor, exact: Plain, gradients: bool
) -> Iterator[Drift]:
    """What the backend gives that a config names meanwhile."""
    with torch.no_grad():
        found = ours(hidden)
    yield _compared(part, number, name, "forward", found, hidden, exact)
    if gradients:
        yield _differentiated(part, number, name, ours, hidden, exact)


def _router(number: int, module: Any, whole: Calls) -> Iterator[Drift]:
    call = whole[module][-1]
    (logits, weights, chosen), hidden = call.out, call.args[0]
    plain = partial(plain_router, module)
    yield _compared("router", number, "the model", "forward", logits, hidden, plain)

    def shares(hidden: Tensor) -> Tensor:
        return plain(hidden).gather(-1, chosen).softmax(-1)

    yield _compared("router's weights", number, "the model", "forward", weights, hidden, shares)
    exact, low = plain(hidden.to(_wide(hidden.dtype))), plain(hidden)
    # A tie may fall otherwise, but not by more than rounding explains.
    behind = exact.topk(chosen.shape[-1]).values[..., -1] - exact.gather(-1, chosen).amin(-1)
    allowed = 4 * ((low - exact).abs().amax() + epsilon(hidden.dtype) * exact.abs().amax())
    share = float(behind.amax().clamp(min=0) / allowed.clamp(min=1e-30))
    yield Drift("router's choice", number, "the model", "forward", share, "worst value")


def _experts(
    number: int, module: Any, whole: Calls, stepped: Calls, others: list[str], gradients: bool
) -> Iterator[Drift]:
    name = _name(module.config, "experts")

    def plain(call: Call, hidden: Tensor) -> Tensor:
        return plain_experts(module, hidden, *call.args[1:3])

    def again(hidden: Tensor) -> Tensor:
        return first_tensor(module(hidden, *call.args[1:3]))

    for kind, call in (("forward", whole[module][-1]), ("decoding", stepped[module][-1])):
        yield _compared("experts", number, name, kind, first_tensor(call.out), call.args[0], partial(plain, call))
    call = whole[module][-1]
    hidden, exact = call.args[0], partial(plain, call)
    if gradients:
        yield _differentiated("experts", number, name, again, hidden, exact)
    for other in others:
        with implementation(module.config, IMPLEMENTATION["experts"], KEY.format(other)):
            yield from _by_another("experts", number, other, again, hidden, exact, gradients)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


@torch.no_grad()
def _compared(
    part: str, layer: int | None, backend: str, kind: str, found: Tensor, given: Tensor, plain: Plain
) -> Drift:
    exact, low = plain(given.to(_wide(given.dtype))), plain(given)
    return Drift(part, layer, backend, kind, *share_of(found, low, exact, epsilon(found.dtype)))


def _differentiated(part: str, layer: int, backend: str, ours: Plain, given: Tensor, plain: Plain) -> Drift:
    """The gradient of what a part is given, of a random gradient of what it gives."""
    d_out: Tensor | None = None

    def gradient(compute: Plain, dtype: torch.dtype) -> Tensor:
        nonlocal d_out
        leaf = given.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            out = compute(leaf)
            if d_out is None:
                d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
            return torch.autograd.grad(out, leaf, d_out.to(out.dtype))[0]

    found, low = gradient(ours, given.dtype), gradient(plain, given.dtype)
    exact = gradient(plain, _wide(given.dtype))
    return Drift(part, layer, backend, "gradient", *share_of(found, low, exact, epsilon(given.dtype)))
