"""What a GPT-OSS model is, and how to give one its own config."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..core import Host, mesh_of
from ..core.journal import Journal, SetAttribute
from .saving import save_pretrained

MODEL_TYPE = "gpt_oss"
IGNORED_ON_SAVE = "_keys_to_ignore_on_save"


def is_gpt_oss(module: object) -> bool:
    """Whether this is a Hugging Face model of the GPT-OSS architecture, of any head and size."""
    return isinstance(module, PreTrainedModel) and module.config.model_type == MODEL_TYPE


class GptOss(Host):
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

    def own_config(self, model: nn.Module, journal: Journal) -> None:
        """Give the model and its parts copies of their configs (usually one), which nothing outside shares."""
        copies: dict[int, PreTrainedConfig] = {}
        for path, module in model.named_modules():
            shared = module.__dict__.get("config")
            if getattr(shared, "model_type", None) == MODEL_TYPE:
                journal.set(model, path, "config", copies.setdefault(id(shared), copy.deepcopy(shared)))

    def release(self, model: nn.Module, journal: Journal) -> None:
        """Put the shared configs back, unless the user has changed the model's own since: then those stay."""
        edits = (edit for edit in journal.edits if isinstance(edit, SetAttribute))
        if all(vars(edit.new) == vars(edit.old) for edit in edits):
            journal.undo(model)

    def tell_new(self, parameters: Sequence[str], model: nn.Module, journal: Journal) -> None:
        """Let `save_pretrained` of the model and its parts write what plain transformers reads, and nothing new."""
        for path, module in model.named_modules():
            if not isinstance(module, PreTrainedModel):
                continue
            # Several ranks write one checkpoint together, and a wrapper may have set its own way: see `checkpoint`.
            if mesh_of(model) is None and "save_pretrained" not in module.__dict__:
                journal.method(model, path, "save_pretrained", save_pretrained)
            inside = {name.removeprefix(f"{path}.") for name in parameters if not path or name.startswith(path)}
            if inside:
                ignored = {*(getattr(module, IGNORED_ON_SAVE, None) or ()), *inside}
                journal.set(model, path, IGNORED_ON_SAVE, ignored)


def config_of(model: object) -> dict[str, Any]:
    """What the config of a Hugging Face model says that differs from the defaults, but for where it comes from."""
    config = model.config.to_diff_dict() if isinstance(model, PreTrainedModel) else {}
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


def config_paths(model: nn.Module) -> list[str]:
    """Where the distinct GPT-OSS configs of a model and its parts are: usually one, `"config"`."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        config = module.__dict__.get("config")
        if getattr(config, "model_type", None) == MODEL_TYPE:
            found.setdefault(id(config), f"{path}.config" if path else "config")
    return list(found.values())


GPT_OSS = GptOss()
