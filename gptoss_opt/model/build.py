"""Building a model without its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss

from ..layout import exchange

GENERATION = "generation_config.json"
RELEASED = {
    "20b": GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "120b": GptOssConfig(num_hidden_layers=36, num_local_experts=128),
}
"""The configs of the released models, by size."""
ROPE_TYPES = ("default", *(name for name in ROPE_INIT_FUNCTIONS if name != "default"))


def read_generation_config(folder: Path, model: PreTrainedModel) -> None:
    """Give a model that generates the generation_config.json of its folder, if there is one."""
    if model.can_generate() and (folder / GENERATION).exists():
        cast(Any, model).generation_config = GenerationConfig.from_pretrained(folder)


def is_config(thing: object) -> bool:
    """Whether something is the config of a model."""
    return isinstance(thing, PreTrainedConfig)


def class_of(config: GptOssConfig) -> type[PreTrainedModel]:
    """The class that a config names, or GptOssForCausalLM. Raises `ValueError` if there is no such class."""
    names = config.architectures or [GptOssForCausalLM.__name__]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"architectures is {names!r}, and must be a list of one name")
    name = names[0]
    found = getattr(modeling_gpt_oss, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"architectures names {name!r}, which is no GPT-OSS model of transformers")
    return found


def build(config: GptOssConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint, in eval mode, whose parameters have their shape, dtype and device, but no memory."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # On the CPU, whatever torch.device(...) is in force.
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model = cast(Any, class_of(config))._from_config(config, dtype=dtype)
    for name, parameter in list(model.named_parameters()):
        path, _, last = name.rpartition(".")
        # One element seen from everywhere: it says where the weights will be, and takes no room there.
        room = torch.empty((), dtype=dtype, device=device).expand(parameter.shape)
        exchange(model.get_submodule(path), last, {last: nn.Parameter(room)})
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    model.name_or_path = config.name_or_path
    return cast(PreTrainedModel, model.eval())
