"""What a `peft.LoraConfig` says, as options of `with_lora`, and the other way round. peft itself is not needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .adapters import Place, is_named

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What peft's "all-linear" means on this architecture: every linear layer but the head."""

SILENT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}
"""Fields that say nothing of what is computed."""

DEFAULTS: Mapping[str, Any] = {
    "bias": "none",
    "init_lora_weights": True,
    "layers_pattern": "layers",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
"""Values that ask for nothing else than is done."""

ALWAYS: Mapping[str, Any] = {"r": 8, "lora_alpha": 8}
"""What peft takes for fields that its JSON does not have, where it is not what `with_lora` takes."""

OPTIONS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("rank", int),
    "lora_alpha": ("alpha", lambda alpha: alpha),
    "lora_dropout": ("dropout", float),
    "use_rslora": ("rslora", bool),
    "layers_to_transform": ("layers", lambda layers: (layers,) if isinstance(layers, int) else tuple(layers)),
    "modules_to_save": ("train", tuple),
    "rank_pattern": ("rank_pattern", lambda patterns: tuple(patterns.items())),
    "alpha_pattern": ("alpha_pattern", lambda patterns: tuple(patterns.items())),
}
"""The fields that are served, but for the targets: the option that each becomes, and how."""


def options_of(config: Any) -> dict[str, Any]:
    """The options of `with_lora` that a `peft.LoraConfig`, or its JSON as a dictionary, says.

    Raises:
        ValueError: a field asks for what is not served, or there are no targets.
    """
    given = dict(config) if isinstance(config, Mapping) else config.to_dict()
    if str(getattr(given.get("peft_type"), "value", given.get("peft_type"))) != "LORA":
        raise ValueError(f"with_lora: config is one of {given.get('peft_type')}. Give a peft.LoraConfig.")
    modules, parameters = given.pop("target_modules", None), given.pop("target_parameters", None)
    layers = given.pop("layers_to_transform", None) if parameters else None
    options: dict[str, Any] = {"targets": _targets(modules, parameters, layers)}
    for name, value in {**ALWAYS, **given}.items():
        empty = value is None or (hasattr(value, "__len__") and not len(value))
        if empty or name in SILENT:
            continue
        if name in OPTIONS:
            option, convert = OPTIONS[name]
            options[option] = convert(value)
        elif value is not False and value != DEFAULTS.get(name, False):
            raise ValueError(
                f"with_lora: config.{name} is {value!r}, which is not served. Leave it out, or train with peft itself "
                "on a model without with_lora."
            )
    return options


def _targets(modules: Any, parameters: Any, layers: Any) -> str | tuple[str, ...]:
    """What `target_modules`, in some layers if they are given, and `target_parameters`, in all, name together."""
    modules = ALL_LINEAR if modules == "all-linear" else modules
    if isinstance(modules, str):
        return _any_of([f"(?:{modules})", *map(_ending, _in_order(parameters))])
    modules, parameters = _in_order(modules), _in_order(parameters)
    if layers is None:
        return (*modules, *parameters)
    numbers = _any_of(map(str, [layers] if isinstance(layers, int) else layers))
    within = rf"(?:.*\.)?layers\.(?:{numbers})\."
    # A name in full counts in any layer.
    return _any_of([*(within + _ending(name) for name in modules), *map(re.escape, modules), *map(_ending, parameters)])


def _in_order(names: Any) -> list[str]:
    """Names as they are given; those of a set, which peft makes of lists, by the alphabet."""
    return sorted(names) if isinstance(names, set) else list(names or ())


def _ending(name: str) -> str:
    return rf"(?:.*\.)?{re.escape(name)}"


def _any_of(patterns: Iterable[str]) -> str:
    return "|".join(patterns)


def config_of(
    options: Mapping[str, Any], adapted: Iterable[Place], trained: Iterable[str], model: Any
) -> dict[str, Any]:
    """The JSON of the `peft.LoraConfig` that says what options of `with_lora` do to a model.

    Args:
        options: of the wrapper.
        adapted: the weights that have an adapter.
        trained: the names of the model's own parameters that are trained.
        model: the model.
    """
    adapted = list(adapted)
    linear, others = [p for p in adapted if p.linear], [p for p in adapted if not p.linear]
    saved = [path for path, module in model.named_modules() if path and _all_trained(path, module, set(trained))]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.can_generate() else None,
        "base_model_name_or_path": model.name_or_path or None,
        "inference_mode": True,
        "r": options["rank"],
        "lora_alpha": options["alpha"],
        # peft has none for parameters of a module, and refuses the adapter.
        "lora_dropout": 0.0 if others else options["dropout"],
        "use_rslora": options["rslora"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _shortest(options, [place.name for place in linear]),
        "target_parameters": _shortest(options, [place.weight for place in others]) or None,
        "rank_pattern": dict(options["rank_pattern"]),
        "alpha_pattern": dict(options["alpha_pattern"]),
        "modules_to_save": saved or None,
    }


def _shortest(options: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The targets that peft takes for these names and no others; the names in full where there are none."""
    targets = options["targets"]
    if options["layers"] is not None or isinstance(targets, str):
        return list(names)
    found = [target for target in targets if any(is_named(name, [target]) for name in names)]
    return found if all(is_named(name, found) for name in names) else list(names)


def _all_trained(path: str, module: nn.Module, trained: set[str]) -> bool:
    """Whether all parameters of a module without modules are trained."""
    names = [f"{path}.{name}" for name, parameter in module._parameters.items() if parameter is not None]
    return bool(names) and not module._modules and trained.issuperset(names)
