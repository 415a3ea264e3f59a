"""Training of a GPT-OSS model: which parameters take gradients, what layers keep for them, and the router's loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core import Journal, layout_of
from .host import config_paths

TRAINED = "what is trained"
"""A slot of a model: see `Wrapper`."""

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(GptOssForCausalLM, name)
)
"""The method of models that has layers computed again in the backward pass: transformers has renamed it."""

ARGUMENTS = tuple(inspect.signature(GptOssForCausalLM.forward).parameters)[1:]
"""The names of the arguments of a forward, in order."""


def why_not_trained(model: nn.Module) -> Iterator[str]:
    """Say why the weights of a model take no gradients, or would lose them."""
    if getattr(model, "is_quantized", False):
        yield (
            "transformers has quantised this model, and quantised weights take no gradient. Load it dense: "
            "gptoss_opt.load(path), or from_pretrained(path, quantization_config=Mxfp4Config(dequantize=True))."
        )
    yield from why_offloaded(model)


def why_offloaded(model: nn.Module) -> Iterator[str]:
    """Say why gradients of a model whose weights accelerate brings for the forward alone would be lost."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    if any(getattr(one, "offload", False) for hook in hooks for one in getattr(hook, "hooks", (hook,))):
        yield (
            "accelerate has offloaded weights of this model, and their gradients would be lost. Load it without "
            "offloading; shard_experts(), shard_tensor_parallel() or FSDP2 spread it over devices."
        )


def why_no_router_loss(model: nn.Module) -> Iterator[str]:
    """Say why the router's loss cannot be added to the loss of a model."""
    if not isinstance(model, GptOssForCausalLM):
        yield (
            f"router_aux_loss is added to the loss of a GptOssForCausalLM, and {type(model).__name__} knows none. "
            "Leave it out."
        )


def train_all(model: nn.Module, journal: Journal) -> str:
    """Let all parameters of a model take gradients, but those that wrappers brought; says how many, in a sentence."""
    brought = set(layout_of(model).new)
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and name not in brought
    }
    frozen = sum(not parameter.requires_grad for parameter in trained.values())
    for name in trained:
        journal.set(model, name, "requires_grad", True)
    return f"{len(trained)} parameters take gradients" + (f", {frozen} of which were frozen before" if frozen else "")


def checkpoint_layers(model: nn.Module, journal: Journal) -> str:
    """Let each layer keep its input alone while the model trains, and be computed again in the backward pass.

    What is set is what `activation_checkpointing_enable` of transformers sets. With that alone, layers of a model in
    training mode forget the cache that `generate` gives them.
    """
    layers = 0
    for path, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            journal.set(model, path, "_gradient_checkpointing_func", checkpointed)
            journal.set(model, path, "gradient_checkpointing", True)
            if isinstance(module, GradientCheckpointingLayer):
                journal.set(model, path, "_can_checkpoint_with_cache", True)
                layers += 1
    return f"while training, each of {layers} layers keeps its input alone, and is computed again in the backward"


def checkpointed(layer: Any, *args: Any) -> Any:
    """Compute a layer of a model in training mode, a partial with all but its input.

    A reentrant checkpoint would cut off the gradient of the router's logits, which leave the layer by a hook.
    """
    if not torch.is_grad_enabled():
        return layer(*args)
    if layer.keywords.get("past_key_values") is not None:
        raise ValueError(
            "a checkpointed layer cannot train on top of a cache: it is computed twice, and would extend the cache "
            "twice. Leave past_key_values out, or use with_full_finetuning(gradient_checkpointing=False)."
        )
    return checkpoint(layer, *args, use_reentrant=False)


def add_router_loss(model: nn.Module, weight: float, journal: Journal) -> str:
    """Let a model add its load balancing loss, times `weight`, to its loss; says so in a sentence."""
    for path in config_paths(model):
        journal.set(model, path, "output_router_logits", True)
        journal.set(model, path, "router_aux_loss_coef", weight)
    journal.set(model, "", "router_aux_loss_coef", weight)
    journal.add_pre_hook(model, "", balance_what_has_a_loss)
    return f"the loss gains {weight:g} x the router's load balancing loss"


def balance_what_has_a_loss(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook that leaves the router's loss out where there is no loss to add it to, as in `generate`.

    transformers counts tokens by the mask of the whole context, which in decoding is not that of the tokens. Raises
    `ValueError` where the loss is wanted and the mask does not say which tokens count.
    """
    given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    asked, has_labels = given.get("output_router_logits"), given.get("labels") is not None
    wanted = module.config.output_router_logits and (module.training or has_labels) if asked is None else asked
    problem = _why_not_counted(given) if wanted else None
    if problem and (asked or has_labels):
        raise ValueError(f"{problem} Or leave the router's loss out of this call: output_router_logits=False.")
    if asked is None and (problem or not wanted):
        kwargs = {**kwargs, "output_router_logits": False}
    return args, kwargs


def _why_not_counted(given: dict[str, Any]) -> str | None:
    """Say why a mask does not tell which tokens the router's loss counts."""
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    tokens = cast(Tensor, given.get("inputs_embeds") if ids is None else ids)
    if mask is None or tokens is None:
        return None
    counts = "router_aux_loss counts tokens by an attention_mask [batch, len] of 0 and 1"
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
        shape = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        return f"{counts}, and this one is {shape}. Give such a mask, or none."
    if not torch.compiler.is_compiling() and bool((mask > 1).any()):
        return f"{counts}, and this one numbers packed sequences. Give position_ids that restart instead."
    return None
