"""`verify`: a probe batch through a wrapped model, and every part of it beside a plain computation of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .backends import other_backends
from .drift import Drift, epsilon
from .parts import Recorded
from .probe import in_eval, recording, run_in_steps, run_whole
from .ranks import VerifyingRanks
from .report import Verification
from .subject import Subject, subject

SAME_DECODING = 1e-6
"""How far logits may be when the same steps run without anybody listening, if not a rounding: a part of their norm."""


def verify(
    model: Any, against: str = "eager", tokens: Tensor | None = None, *, gradients: bool = False
) -> Verification:
    """Compare every part of a wrapped model with a plain eager computation of its weights, on a batch of tokens.

    A self-test for your model on your machine: the embedding, norms, attention, router and experts of every layer, the
    rotary embedding and the head get what they get in a forward, attention and experts in decoding on a cache too, and
    what they give is compared with plain products in a higher precision. Layers that decode in a few calls must give
    what they give part by part.
    Allowed is a small multiple of the error that plain computations in the model's own dtype have. Every other backend
    that claims to serve here is tried as well. Nothing is changed; adapters are computed as they are, without dropout.

    Of a model that several ranks hold together every rank must call it, and all get the same verdict: that of the rank
    where each drift is worst. The whole weights of one part at a time are gathered on each of them.

    Args:
        model: a GPT-OSS model, with wrappers or without, in one process or sharded by shard_tensor_parallel and
            shard_experts; not one that FSDP holds.
        against: "eager", the only one there is.
        tokens: int64 `[batch, length]`; by default two random rows, longer than the window, one of them padded.
            Ranks that compute the same tokens together must be given the same, and others may have their own.
        gradients: whether the gradients of what attention and experts are given are compared too.

    Returns:
        The verdict, and every drift.

    Raises:
        ValueError: another `against`, tokens that are none, a model that FSDP holds, or ranks that disagree; on all
            ranks.

    Example:
        >>> found = verify(with_flash_attention(model))
        >>> found.right
        True
        >>> print(found.verdict)
        Right: all ... results are what plain eager computations give, as far as rounding goes; ...
    """
    ranks = VerifyingRanks.of(model)
    # Whatever the caller has switched off: gradients are taken here, and no tensor is one of inference alone.
    with torch.inference_mode(False), torch.no_grad():
        asked = ranks.checked(partial(subject, model, against, tokens, gradients, ranks))
        ranks.agree_on_tokens(asked.fingerprint)
        with in_eval(asked.model):
            drifts = ranks.worst(list(_drifts(asked, ranks)))
    return Verification(drifts, _title(asked, ranks))


def _title(asked: Subject, ranks: VerifyingRanks) -> str:
    dtype, device = str(asked.model.dtype).removeprefix("torch."), asked.model.device.type
    where = str(asked.model.device) if ranks.count == 1 else f"{ranks.count} ranks ({device})"
    sizes = " or ".join(sorted(set(ranks.exchange(asked.size))))
    return f"{type(asked.model).__name__}, {len(asked.layers)} layers in {dtype} on {where}: {sizes}"


def _drifts(asked: Subject, ranks: VerifyingRanks) -> Iterator[Drift]:
    model, layers, tokens, seen = asked.model, asked.layers, asked.tokens, asked.seen
    parts: list[nn.Module] = [part for layer in layers for part in (layer.self_attn, layer.mlp.experts)]
    others: list[nn.Module] = [
        part for layer in layers for part in (layer.mlp.router, layer.input_layernorm, layer.post_attention_layernorm)
    ]
    around: list[nn.Module] = [model.get_input_embeddings(), model.model.rotary_emb, model.model.norm]
    with recording([*parts, *others, *around, model.get_output_embeddings()]) as whole:
        run_whole(model, tokens, seen)
    with recording(parts) as stepped:
        run_in_steps(model, tokens, seen)
    # Without padding, and with nobody listening, whole layers are computed in a few calls where that can be.
    everything = torch.ones_like(seen)
    with recording(parts):
        listened = run_in_steps(model, tokens, everything)
    alone = run_in_steps(model, tokens, everything)
    found = Recorded(seen, whole, stepped, other_backends(model, ranks), asked.gradients)
    yield found.embedding(model.get_input_embeddings())
    for number, layer in enumerate(tqdm(layers, desc="verifying", unit="layer", delay=1, disable=not ranks.is_first)):
        yield from found.attention(number, layer.self_attn)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            yield found.norm(number, norm)
        yield from found.router(number, layer.mlp.router)
        yield from found.experts(number, layer.mlp.experts)
    yield found.head(model)
    yield found.norm(None, model.model.norm)
    yield found.rotary(model.model.rotary_emb)
    off = float((alone.double() - listened.double()).norm() / listened.double().norm().clamp(min=1e-30))
    allowed = max(SAME_DECODING, epsilon(model.dtype))
    yield Drift("head", None, "the model as it runs", "decoding", off / allowed, "RMS")
