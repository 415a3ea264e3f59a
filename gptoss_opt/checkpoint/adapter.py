"""Adapters in files: a folder as peft writes and reads it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core import layout_of
from ..core.record import wrapped_model
from ..model.adapters import Place, adapter_parameters, adapters_on, sum_of_bits
from ..model.peft_config import config_of
from .peft_format import CONFIG, IN_OUT, LAYOUTS, WEIGHTS, OnDisk, Shape, key_of, on_disk, parameter_of
from .reader import CheckpointError, TensorInfo, as_checkpoint_errors, parse_object, read_header, read_tensor
from .save import gather_state_dict, ranks_of, refuse_options, write_on_first
from .writer import write_files


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters on a model as peft does: `adapter_config.json` and `adapter_model.safetensors`.

    `PeftModel.from_pretrained(base, path)` on the dense base gives the same logits, and so does `load_adapter`. Of a
    model that several ranks hold together, each must call it, and rank 0 writes one ordinary folder. What `train=` of
    `with_lora` named is written too.

    Args:
        model: a model with `with_lora`, or a module around one.
        path: the folder; it is made where it does not exist.

    Raises:
        ValueError: there are no adapters on the model.
        OSError: they could not be written; on all ranks.

    Example:
        >>> save_adapter(with_lora(model), folder)
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    model = wrapped_model(model)
    content = _Content.of(model)
    tensors = gather_state_dict(model, only=content.names)
    write_on_first(model, tensors, path, lambda folder: content.write(folder, dict(tensors)))
    adapters_on(model).state.keep(model)


@dataclass(frozen=True)
class _Content:
    """What is written of a model with adapters: its config, and the names of the parameters that are trained.

    Attributes:
        config: the JSON of a `peft.LoraConfig`.
        adapted: the places that have adapters.
        trained: the parameters of the model's own.
    """

    config: Mapping[str, Any]
    adapted: Sequence[Place]
    trained: Sequence[str]

    @classmethod
    def of(cls, model: nn.Module) -> _Content:
        options = adapters_on(model).wrapper.options()
        adapted = [place for place, *_ in adapter_parameters(model)]
        new = set(layout_of(model).new)
        trained = [name for name, p in model.named_parameters() if p.requires_grad and name not in new]
        return cls(config_of(options, adapted, trained, model), adapted, trained)

    @property
    def factors(self) -> list[str]:
        return [name for place in self.adapted for name in place.factors]

    @property
    def names(self) -> set[str]:
        return {*self.trained, *self.factors}

    def write(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Write a folder with these values of all that is trained."""
        file = {key_of(name, self.adapted): values[name] for name in self.trained}
        for one in on_disk(self.adapted):
            file |= one.written(*(values[name] for name in one.place.factors))
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{WEIGHTS}.part"
        try:
            described = {key: torch.empty_like(tensor, device="meta") for key, tensor in file.items()}
            write_files({part: described}, iter(file.items()), on_bytes=lambda _: None)
            # In the order of the options: the first pattern that fits counts.
            (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
            part.replace(folder / WEIGHTS)
        finally:
            part.unlink(missing_ok=True)


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """`save_pretrained` of a model with adapters: the adapters alone are written, as of a model that peft adapts.

    Args:
        model: the model.
        save_directory: see `save_adapter`.
        is_main_process: whether a process that holds all of the model writes; where ranks hold it, rank 0 does.
        state_dict: what to take values from, if not from the model.
        **options: those of transformers that ask for nothing else.

    Raises:
        ValueError: an option that is not served here.
    """
    refuse_options(
        options,
        {"save_peft_format": True},
        "a model with adapters. Save without it; export(model, path) writes a whole checkpoint.",
    )
    if state_dict is not None:
        _save_given(model, save_directory, state_dict)
    elif is_main_process or ranks_of(model) is not None:
        save_adapter(model, save_directory)


def _save_given(model: nn.Module, path: str | os.PathLike[str], state_dict: Mapping[str, Tensor]) -> None:
    """Write the adapters on a model with the values of a state dict. No other process is asked for anything."""
    content = _Content.of(model)
    for name in content.names:
        if not isinstance(state_dict.get(name), Tensor) or isinstance(state_dict[name], DTensor):
            what = "only a part of" if name in state_dict else "no"
            raise ValueError(
                f"save_pretrained(state_dict=...): it has {what} {name}, which is trained. Give whole tensors by the "
                "names in model.state_dict(), or none: save_adapter(model, path) gathers them."
            )
    content.write(Path(path), state_dict)
    adapters_on(model).state.kept = {name: sum_of_bits(state_dict[name]) for name in content.factors}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, of which the config has been read, and what the file of weights says it holds.

    Attributes:
        folder: where it is.
        config: what `adapter_config.json` says.
        tensors: those of the file, by key.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> AdapterFile:
        """Raises `CheckpointError` if the folder holds no adapter, or a damaged one."""
        folder = Path(path)
        with as_checkpoint_errors(folder):
            for name in (CONFIG, WEIGHTS):
                if not (folder / name).is_file():
                    raise CheckpointError(f"{folder}: there is no {name}. Give the folder of a peft adapter.")
            config = parse_object(folder / CONFIG, (folder / CONFIG).read_bytes())
            return cls(folder, config, read_header(folder / WEIGHTS))

    def assigned(
        self, adapted: Sequence[Place], shapes: Mapping[str, Shape], layout: str | None = None
    ) -> dict[str, Callable[[], Tensor]]:
        """What gives the values of each parameter: of the adapters at some places, and of the model's own.

        Args:
            adapted: the weights that have an adapter, in the order of the model's parameters.
            shapes: those of all parameters, whole, by name.
            layout: of the adapters of experts, "in_out" or "swapped"; None if the file is to tell.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or belongs to nothing; or the file does not tell.
        """
        on = on_disk(adapted)
        layout = layout or self._layout(on, shapes)
        found: dict[str, Callable[[], Tensor]] = {}
        expected: dict[str, Shape] = {}
        for one in on:
            a, b = one.place.factors
            expected |= dict(zip(one.keys, one.shapes(shapes[a], shapes[b], layout=layout), strict=True))
            read = functools.partial(one.read, self, shapes[a][0], layout=layout)
            found |= {a: functools.partial(_nth, read, 0), b: functools.partial(_nth, read, 1)}
        for key in sorted(self.tensors.keys() - expected.keys()):  # in one order on all ranks
            name = parameter_of(key)
            if name in shapes:
                expected[key], found[name] = shapes[name], functools.partial(self.__getitem__, key)
        for key, shape in expected.items():
            self._check(key, shape)
        if unknown := sorted(self.tensors.keys() - expected.keys()):
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {unknown[0]}{more} belongs to nothing that its {CONFIG} names, or not to "
                "this model. Give the adapter of a model of this size, trained with what with_lora serves."
            )
        return found

    def __getitem__(self, key: str) -> Tensor:
        """Read a tensor."""
        return read_tensor(self.tensors[key], (), out=None, on_bytes=None)

    def _check(self, key: str, shape: Shape) -> None:
        file = self.folder / WEIGHTS
        if key not in self.tensors:
            raise CheckpointError(f"{file}: there is no {key}, which by its {CONFIG} should be there. Save it again.")
        info = self.tensors[key]
        if tuple(info.shape) != shape or not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{info}: is {info.dtype} {list(info.shape)}, and should be floating point {list(shape)}, by {CONFIG} "
                "and this model. Give the adapter of a model of this size."
            )

    def _layout(self, on: Sequence[OnDisk], shapes: Mapping[str, Shape]) -> str:
        """The layout of the adapters of experts: what all shapes allow, else what the version of peft says."""
        fitting = list(LAYOUTS)
        of_experts = [one for one in on if one.place.of_experts and all(key in self.tensors for key in one.keys)]
        for one in of_experts:
            there = tuple(tuple(self.tensors[key].shape) for key in one.keys)
            a, b = (shapes[name] for name in one.place.factors)
            fitting = [layout for layout in fitting if one.shapes(a, b, layout=layout) == there]
        if len(fitting) < len(LAYOUTS) or not of_experts:
            return fitting[0] if fitting else IN_OUT
        version = self.config.get("peft_version")
        if version is None or Version(str(version).partition("@")[0]) < Version("0.19.0.dev0"):
            return IN_OUT
        raise CheckpointError(
            f"{self.folder / WEIGHTS}: peft {version} wrote adapters of experts in one of two layouts, and as the "
            "weights are square the file does not tell which. Say it: experts_layout='in_out' if they were trained "
            "with transformers 5, else 'swapped'; of peft 0.19.0 it is the other way round."
        )


def _nth(read: Callable[[], tuple[Tensor, ...]], n: int) -> Tensor:
    return read()[n]
