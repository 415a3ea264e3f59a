"""The model that a plan is for: found by whatever names it, without its weights."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..core import CompatibilityError, Phase, Stack, Wrapper, layout_of, stack_of
from ..core.record import wrapped_model
from ..layout import MXFP4
from ..model.build import RELEASED, build, is_config
from ..model.host import GPT_OSS
from .parameters import Parameters, parameters_of

PLACEHOLDER = "PATH"
"""Stands in code for the checkpoint of a config."""
RELEASED_AT = {size: f"openai/gpt-oss-{size}" for size in RELEASED}
"""Their names on the hub."""


@dataclass(frozen=True)
class Target:
    """A model without its weights.

    Attributes:
        config: what it is made of.
        model: the model that was given, or one on the meta device of its first layer alone: the others are like it.
        packed: whether its experts are packed as MXFP4 already, so that nothing is rounded.
        source: the folder or name that `load` takes; None for a model that is there.
        repeats: how many layers of the target each layer of `model` stands for.
    """

    config: Any
    model: nn.Module
    packed: bool
    source: str | None
    repeats: int = 1
    _known: dict[Stack, Parameters | ValueError] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def already(self) -> dict[str, Wrapper]:
        """The wrappers that are on a model that is there, by name."""
        return {wrapper.name: wrapper for wrapper in stack_of(self.model)} if self.source is None else {}

    def held(self, stack: Stack) -> Parameters:
        """What the fullest rank holds in the layout of a stack.

        Raises:
            CompatibilityError: a wrapper cannot be on this model, as far as that can be said without its ranks.
            LayoutError, ValueError: see `parameters_of`.
        """
        if stack not in self._known:
            self._known[stack] = self._computed(stack)
        known = self._known[stack]
        if isinstance(known, ValueError):
            raise known.with_traceback(None)  # it may be raised many times, and is to be read once
        return known

    def _computed(self, stack: Stack) -> Parameters | ValueError:
        """What the fullest rank holds, or the error that says why a stack cannot be on this model."""
        alone = [one for one in stack if one.phase != Phase.PARALLEL and one.name not in self.already]
        problems = [f"{wrapper.name}: {problem}" for wrapper in alone for problem in wrapper.check(self.model)]
        if problems:
            return CompatibilityError(problems)
        try:
            return parameters_of(self.model, stack, repeats=self.repeats)
        except ValueError as error:  # a LayoutError is one
            return error


def target_of(model: Any) -> Target:
    """The target that a model object, a folder, a cached hub id, a config, "20b" or "120b" names.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        TypeError: it is none of these.

    Example:
        >>> target_of("20b").source, target_of("20b").packed
        ('openai/gpt-oss-20b', True)
    """
    if isinstance(model, nn.Module):
        inner = wrapped_model(model)
        if reason := GPT_OSS.why_not(inner):
            raise CompatibilityError([f"plan: {reason}"])
        packed = bool(len(stack_of(inner))) and MXFP4.name in layout_of(inner).storages.values()
        return Target(getattr(inner, "config", None), inner, packed, None)
    if is_config(model):
        if getattr(model, "model_type", None) != "gpt_oss":
            raise CompatibilityError([f"plan: the config is of {getattr(model, 'model_type', 'no')!r}, not 'gpt_oss'."])
        return _of_config(model, _is_packed(model), PLACEHOLDER)
    if isinstance(model, str) and model in RELEASED:
        return _of_config(RELEASED[model], True, RELEASED_AT[model])
    if isinstance(model, str | os.PathLike):
        config = Checkpoint.open(model).config
        return _of_config(config, _is_packed(config), os.fspath(model))
    raise TypeError(
        f"plan was given a {type(model).__name__}. Give a model, a folder, a name on the hub, a config, or '20b'."
    )


def _is_packed(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _of_config(config: Any, packed: bool, source: str) -> Target:
    whole, first = copy.deepcopy(config), copy.deepcopy(config)
    first.num_hidden_layers = min(1, config.num_hidden_layers)
    first.layer_types = config.layer_types[: first.num_hidden_layers]
    model = build(first, torch.device("meta"), torch.bfloat16)
    return Target(whole, model, packed, source, config.num_hidden_layers)
