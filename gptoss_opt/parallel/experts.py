"""Expert parallelism: each rank holds some of a layer's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch import nn

from ..core import Journal
from ..distributed import ModelMesh, Region, split
from ..layout import Axis, Layout, Part, Split
from ..model.modules import expert_modules
from .dispatch import ExpertPlacement, PartOfExperts, dispatched, part_of_experts

PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def placements_of(
    model: nn.Module, degree: int, placement: str | Sequence[ExpertPlacement]
) -> Sequence[ExpertPlacement]:
    """The experts that each rank holds, layer by layer."""
    if not isinstance(placement, str):
        return placement
    return [tuple(map(tuple, split(module.num_experts, degree))) for _, module in expert_modules(model)]


def why_no_expert_parallel(model: nn.Module, degree: int, placement: str | Sequence[ExpertPlacement]) -> Iterator[str]:
    """Say what stands in the way of spreading the experts over `degree` ranks."""
    num_experts = cast(Any, model).config.num_local_experts
    layers = len(expert_modules(model))
    if degree > num_experts:
        yield f"{num_experts} experts do not go on {degree} ranks: one would have none. Use {num_experts} or fewer."
        return
    if isinstance(placement, str):
        return
    if len(placement) != layers:
        yield f"the placement is for {len(placement)} layers, and the model has {layers}. Give one for each."
    for number, layer in enumerate(placement):  # the first that is wrong will do
        held = sorted(expert for experts in layer for expert in experts)
        if len(layer) != degree or not all(layer):
            problem = f"the placement of layer {number} is for {sum(map(bool, layer))} ranks, of {degree}"
            yield f"{problem}. Give each one expert at least."
            return
        elif held != list(range(num_experts)):
            yield (
                f"the placement of layer {number} holds the experts {held}. Name each of the {num_experts} once, from "
                f"0 to {num_experts - 1}: balance_experts(load, degree={degree}) does."
            )
            return


def placed_experts_layout(
    model: nn.Module, layout: Layout, axis: Axis, placements: Sequence[ExpertPlacement]
) -> Layout:
    """`layout` with the experts of each layer spread over an axis."""
    for (path, _), placement in zip(expert_modules(model), placements, strict=True):
        parts: tuple[Part, ...] = tuple(_as_range(experts) for experts in placement)
        layout = layout.split([f"{path}.{name}" for name in PARAMETERS], Split(0, axis.name, parts))
    return layout


def _as_range(experts: Sequence[int]) -> Part:
    whole = range(experts[0], experts[-1] + 1)
    return whole if len(whole) == len(experts) else tuple(experts)


def attach_placed_experts(
    model: nn.Module, layout: Layout, mesh: ModelMesh, axis: str, dispatch: str, journal: Journal
) -> str:
    """Let the ranks along an axis meet around the experts; says how, in a sentence."""
    hidden, layers = cast(Any, model).config.hidden_size, expert_modules(model)
    function: Callable[..., Any] = part_of_experts if dispatch == "all_reduce" else dispatched
    for path, module in layers:
        placement = next(one for one in layout.form(f"{path}.down_proj").splits if one.axis == axis)
        held = tuple(tuple(part) for part in placement.parts)
        data = PartOfExperts.placed(Region(mesh, axis), held, module.down_proj_bias.device)
        journal.around(model, path, function, data)
    if dispatch == "all_reduce":
        return f"each forward, over axis {axis!r}: {len(layers)} all-reduces of [tokens, {hidden}], after the experts"
    line = f"{len(layers)} times all-to-all of [routes, {hidden}] to the experts and back, and of the counts"
    return f"each forward, over axis {axis!r}: {line}"
