"""Calls of a model in training that would lose gradients of its adapters: they are put right, or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core import Journal
from .attention import PARAMETERS
from .changes import ADAPTERS
from .modules import decoder_path


def keep_gradients(model: Any, journal: Journal) -> None:
    """Let adapters that are on a model already get their gradients from every call, or have the call refused.

    Reentrant checkpoints (`use_reentrant=True`) give none to what is in a layer whose input takes none, as that of the
    first layer does where embeddings are frozen. transformers sees to that for `input_ids`, if it turned the
    checkpoints on itself.
    """
    journal.add_pre_hook(model, decoder_path(model), take_gradients)
    head: Any = model.get_output_embeddings()
    if head is not None and ADAPTERS in head.__dict__:
        journal.add_pre_hook(model, "", refuse_fused_head)


def refuse_fused_head(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a model with adapters on its head, which TRL's trainers compute from the weight alone."""
    if kwargs.get("fused_lm_head"):
        raise ValueError(
            "TRL computes the loss with the weight of lm_head, past its adapter, which would get no gradient. Leave "
            "lm_head out of with_lora's targets, or train with transformers' Trainer."
        )


def take_gradients(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook of the decoder: where reentrant checkpoints are to come, its embeddings take a gradient."""
    if not (module.training and torch.is_grad_enabled() and any(map(_is_reentrant, module.layers))):
        return None
    asked = kwargs.get("output_router_logits")
    if module.config.output_router_logits if asked is None else asked:
        raise ValueError(
            "output_router_logits: reentrant checkpoints cut off the gradient of the router's loss. Set "
            "use_reentrant=False, or leave that loss out: output_router_logits=False."
        )
    given = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
    input_ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (input_ids is None) == (embeds is None):  # which the decoder refuses itself
        return None
    embeds = module.embed_tokens(input_ids) if embeds is None else embeds
    embeds = embeds if embeds.requires_grad else embeds.detach().requires_grad_()
    return (), {**given, "input_ids": None, "inputs_embeds": embeds}


def _is_reentrant(layer: Any) -> bool:
    """Whether a layer is computed again by a checkpoint that is reentrant, or that does not say."""
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    function = layer._gradient_checkpointing_func
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
