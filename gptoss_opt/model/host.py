"""What a GPT-OSS model is, and how to give one its own config."""

from __future__ import annotations

import copy
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..core.edit import Journal, SetAttribute

MODEL_TYPE = "gpt_oss"


def is_gpt_oss(module: object) -> bool:
    """Whether this is a Hugging Face model of the GPT-OSS architecture, of any head and size."""
    return isinstance(module, PreTrainedModel) and module.config.model_type == MODEL_TYPE


class GptOss:
    """The host of wrappers that go on a GPT-OSS model."""

    def why_not(self, model: nn.Module) -> str | None:
        """The reason why `model` is not a GPT-OSS model, or None."""
        if is_gpt_oss(model):
            return None
        name = type(model).__name__
        inner = next((path for path, module in model.named_modules() if is_gpt_oss(module)), None)
        if inner is not None:
            return f"{name} is not a GPT-OSS model but holds one at .{inner}: wrap that one, before it is put inside."
        if isinstance(model, PreTrainedModel):
            return f"{name} is a {model.config.model_type} model: only {MODEL_TYPE} models can be wrapped."
        return f"{name} is not a GPT-OSS model: give a GptOssForCausalLM (or another GptOss class of transformers)."

    def privatise(self, model: nn.Module, journal: Journal) -> None:
        """Give the model and all its parts one copy of the config, which nothing outside shares."""
        shared = model.config
        private = copy.deepcopy(shared)
        for path, module in model.named_modules():
            if module.__dict__.get("config") is shared:
                journal.set(model, path, "config", private)

    def release(self, model: nn.Module, journal: Journal) -> None:
        """Put the shared config back, unless the user has changed the model's own since: then that one stays."""
        shared = next(edit.old for edit in journal.edits if isinstance(edit, SetAttribute))
        if cast(PreTrainedModel, model).config.to_dict() == shared.to_dict():
            journal.undo(model)


GPT_OSS = GptOss()
