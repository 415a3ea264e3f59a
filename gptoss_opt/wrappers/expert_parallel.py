"""`shard_experts`: every rank holds some of each layer's experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core import Attachment, Choice, Filler, Report, choose, layout_of, mesh_of, takes_model
from ..distributed import Shape, as_data
from ..kernels.experts import DENSE_BACKENDS
from ..layout import Layout
from ..model.experts import EXPERTS, experts_request, fill_experts, why_experts_stay, why_no_experts
from ..model.modules import expert_modules
from ..parallel.dispatch import ExpertPlacement
from ..parallel.experts import attach_placed_experts, placed_experts_layout, placements_of, why_no_expert_parallel
from ..parallel.sharded import DEFAULTS, Sharding

DISPATCHES = ("all_reduce", "all_to_all")


@dataclass(frozen=True, kw_only=True, repr=False)
class ExpertParallel(Sharding):
    """What `shard_experts` builds. Options: `mesh`, `degree`, `dispatch`, `placement`."""

    dispatch: str = "all_reduce"
    placement: str | tuple[ExpertPlacement, ...] = "contiguous"

    name: ClassVar[str] = "shard_experts"
    own: ClassVar[str] = "ep"
    # transformers' own computation of the experts knows of none that are elsewhere.
    defaults: ClassVar[Mapping[str, Filler]] = {**DEFAULTS, EXPERTS: fill_experts}

    def __post_init__(self) -> None:
        Sharding.__post_init__(self)
        if self.dispatch not in DISPATCHES:
            raise ValueError(
                f"{self.name}: dispatch is {self.dispatch!r}. Use one of {', '.join(map(repr, DISPATCHES))}."
            )
        if isinstance(self.placement, str) and self.placement != "contiguous":
            raise ValueError(
                f"{self.name}: placement is {self.placement!r}. Use 'contiguous', or what balance_experts(load, "
                "degree) gives."
            )

    @property
    def own_tokens(self) -> bool:
        return self.dispatch == "all_to_all"

    def why_not(self, model: nn.Module) -> Iterable[str]:
        stay = *why_no_experts(model), *why_experts_stay(model)
        return *stay, *why_no_expert_parallel(model, self.axis.degree, self.placement)

    def choice(self, model: nn.Module) -> Choice:
        return choose(DENSE_BACKENDS, experts_request(model), "auto", self.name)

    def spread(self, model: nn.Module, layout: Layout) -> Layout:
        placements = placements_of(model, self.axis.degree, self.placement)
        return placed_experts_layout(model, layout, self.axis, placements)

    def regions(self, model: nn.Module) -> Iterable[str]:
        return (path for path, _ in expert_modules(model))

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        mesh, axis = mesh_of(model), self.axis.name
        return Report((attach_placed_experts(model, layout_of(model), mesh, axis, self.dispatch, journal),))


@takes_model
def shard_experts(
    *,
    mesh: DeviceMesh | Mapping[str, int] | Shape | None = None,
    degree: int | None = None,
    dispatch: str = "all_reduce",
    placement: str | Sequence[Sequence[Sequence[int]]] = "contiguous",
) -> ExpertParallel:
    """Expert parallelism: each rank holds and computes some experts of every layer, and skips routes to the others.

    Parameters are DTensors, so that optimizers and `clip_grad_norm_` see the true ones; keys and shapes are those of
    the whole model, and `save_pretrained`, called on every rank, writes an ordinary checkpoint, with the experts in
    their original order. Cannot be undone: what belongs to other ranks is dropped. With `shard_tensor_parallel` on the
    same ranks, that takes attention and the vocabulary: `shard_experts(shard_tensor_parallel(model))`.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a wrapper to
            give to `compose` or `load`.
        mesh: one axis of a DeviceMesh, such as `init_distributed((2, 4), ("dp", "ep"))["ep"]`. Along other axes of that
            mesh whose names begin with "dp", gradients are averaged. Or the shape of a mesh of all processes, such as
            {"ep": 2, "tp": 8}, of which this takes "ep": such a wrapper is data, made before there are processes. All
            processes are along one axis, if it is left out.
        degree: how many ranks hold the experts together, instead of a mesh: groups of neighbours, data parallel to each
            other.
        dispatch: "all_reduce" where the ranks are given the same tokens: each adds what its experts give. "all_to_all"
            where each has its own (data parallel attention): tokens travel to the ranks of their experts and back, and
            gradients are averaged over the ranks, as of one batch in as many parts.
        placement: "contiguous", or for each layer and rank its experts, as `balance_experts` gives them for a measured
            load. Numbers of experts may be uneven.

    Raises:
        CompatibilityError: there is no process group, more ranks than experts, a placement that does not fit, or ranks
            disagree; on all ranks.
        ValueError: there is no such dispatch or placement.

    Example:
        >>> shard_experts(degree=2, placement=balance_experts([[8, 1, 1, 6]] * 3, degree=2)).placement[0]
        ((0,), (1, 2, 3))
    """
    if not isinstance(placement, str):
        try:
            placement = tuple(tuple(tuple(sorted(map(int, experts))) for experts in layer) for layer in placement)
        except TypeError as error:
            raise TypeError(
                f"shard_experts: placement is {placement!r}. Give 'contiguous', or for each layer and rank its experts."
            ) from error
    return ExpertParallel(mesh=as_data(mesh), degree=degree, dispatch=dispatch, placement=placement)
