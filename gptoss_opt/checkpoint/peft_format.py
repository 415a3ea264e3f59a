"""Adapters as peft has them on disk: what its files call them, how they lie there, and what its config says of them.

peft wraps a module in one of its own, whose `lora_A` and `lora_B` are linear layers. For a parameter of a module, such
as the weights of all experts, it does so too; a second parameter of the same module wraps that wrapper again, which
then is its `base_layer`. The factors of all experts lie in one matrix: A [E r, in] expert by expert, and B [out, r E],
in which the expert runs fastest (peft.tuners.lora.layer.ParamWrapper).

That is the layout "in_out". Some versions of peft took the inputs of experts for their outputs, 0.19.0 with
transformers 5 and all later ones with transformers 4: then A is [E r, out] and B [in, r E], the layout "swapped".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..model.adapters import Place

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
IN_OUT, SWAPPED = LAYOUTS = "in_out", "swapped"
PREFIX = "base_model.model."

Shape = tuple[int, ...]


class TensorsByKey(Protocol):
    """What gives the tensors of a file."""

    def __getitem__(self, key: str, /) -> Tensor: ...


@dataclass(frozen=True)
class OnDisk:
    """One adapter in a file.

    Attributes:
        place: the weight that it stands beside.
        keys: the keys of A and B.
    """

    place: Place
    keys: tuple[str, str]

    def written(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The tensors of the file, by key, from A [..., r, in] and B [..., out, r]."""
        if self.place.of_experts:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        return {key: factor.contiguous() for key, factor in zip(self.keys, (a, b), strict=True)}

    def read(self, file: TensorsByKey, num_experts: int, *, layout: str) -> tuple[Tensor, Tensor]:
        """A and B from the tensors of a file."""
        a, b = (file[key] for key in self.keys)
        if not self.place.of_experts:
            return a, b
        a, b = a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
        return (b.mT, a.mT) if layout == SWAPPED else (a, b)

    def shapes(self, a: Shape, b: Shape, *, layout: str) -> tuple[Shape, Shape]:
        """The shapes in the file of A [..., r, in] and B [..., out, r]."""
        if not self.place.of_experts:
            return a, b
        num_experts, rank, num_in = a
        num_out = b[1]
        if layout == SWAPPED:
            num_in, num_out = num_out, num_in
        return (num_experts * rank, num_in), (num_out, num_experts * rank)


def key_of(parameter: str, places: Iterable[Place]) -> str:
    """What a parameter of the model's own is called in a file, where some places have adapters, which lie around it."""
    path, _, name = parameter.rpartition(".")
    inside = ".base_layer" * sum(place.module == path for place in places)
    return f"{PREFIX}{path}{inside}.{name}"


def parameter_of(key: str) -> str:
    """The parameter of the model's own that is called so in a file, if any is."""
    return key.removeprefix(PREFIX).replace(".base_layer", "")


def on_disk(places: Iterable[Place]) -> list[OnDisk]:
    """What the adapters of these places, in the order of the model's parameters, are called in a file."""
    places = list(places)
    outermost = {place.module: place for place in places}
    found = []
    for place in places:
        path = f"{PREFIX}{place.module}{'' if outermost[place.module] == place else '.base_layer'}"
        found.append(OnDisk(place, (f"{path}.lora_A.weight", f"{path}.lora_B.weight")))
    return found
