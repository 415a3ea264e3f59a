"""Where the parts of a GPT-OSS model are: its decoder, attention, experts, embedding and head, by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssExperts

from ..core.journal import ClassForward

Named = list[tuple[str, Any]]
"""Paths and modules."""

WRAPPED = "_gptoss_opt_wrapped"
"""An attribute of the modules that a wrapper computes for. Others with the same config are as transformers has them."""

NO_LAYERS = "this model has no layers (num_hidden_layers is 0), and so nothing to wrap. Build it with one at least."


def execution_device(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module computes: where accelerate's hook brings its weights, if it has one, else where they are."""
    hook: Any = getattr(module, "_hf_hook", None)
    found = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in found if device is not None), weight.device)


def is_plain(module: nn.Module, inner: Callable[..., Any], forward: Callable[..., Any] | None) -> bool:
    """Whether `inner`, around which a forward of ours lies, is still this one of the module's class, and not training.

    While it trains, a layer computes the same whether gradients are recorded or not: checkpointing relies on that.
    """
    return not module.training and isinstance(inner, ClassForward) and type(module).forward is forward


def own_forward(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward that a class has from its package; None if somebody has put another one there."""
    package = cls.__module__.partition(".")[0]
    function: Any = cls.forward
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] != package:
            return None
        function = getattr(function, "__wrapped__", None)
    return cls.forward


def attention_modules(model: nn.Module) -> Named:
    """The attention of each layer."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, GptOssAttention)]


def expert_modules(model: nn.Module) -> Named:
    """The experts of each layer."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, GptOssExperts)]


def vocabulary_modules(model: nn.Module) -> list[tuple[str, Any, str]]:
    """The embedding, and the head if it is over the vocabulary: path, module, and the name of its weight."""
    found = [cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()]
    paths = {module: path for path, module in model.named_modules()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (paths[one], one, names.get(id(one._parameters.get("weight")), f"{paths[one]}.weight"))
        for one in found
        if one is not None
    ]


def path_of_head(model: nn.Module) -> str:
    """The path of the head over the vocabulary."""
    head = cast(Any, model).get_output_embeddings()
    return str(next(path for path, module in model.named_modules() if module is head))


def decoder_path(model: nn.Module) -> str:
    """The path of the decoder, which holds the layers; "" if that is the model itself."""
    decoder = cast(Any, model).base_model
    return str(next(path for path, module in model.named_modules() if module is decoder))
