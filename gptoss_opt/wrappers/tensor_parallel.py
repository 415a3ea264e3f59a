"""`shard_tensor_parallel`: every rank holds some heads, a slice of every expert, and a part of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core import Attachment, Report, layout_of, mesh_of, takes_model
from ..distributed import Shape, as_data
from ..layout import Layout
from ..model.experts import why_experts_stay
from ..model.modules import attention_modules, expert_modules
from ..parallel.sharded import Sharding
from ..parallel.tensor import (
    attach_attention,
    attach_sliced_experts,
    attention_layout,
    sliced_experts_layout,
    why_no_tensor_parallel,
)
from ..parallel.vocabulary import attach_vocabulary, vocabulary_layout


@dataclass(frozen=True, kw_only=True, repr=False)
class TensorParallel(Sharding):
    """What `shard_tensor_parallel` builds. Options: `mesh`, `degree`, `experts`, `lm_head`."""

    experts: bool = True
    lm_head: bool = True

    name: ClassVar[str] = "shard_tensor_parallel"
    own: ClassVar[str] = "tp"

    def why_not(self, model: nn.Module) -> Iterable[str]:
        stay = why_experts_stay(model) if self.experts else ()
        return *stay, *why_no_tensor_parallel(model, self.axis.degree, experts=self.experts, vocabulary=self.lm_head)

    def spread(self, model: nn.Module, layout: Layout) -> Layout:
        layout = attention_layout(model, layout, self.axis)
        if self.experts:
            layout = sliced_experts_layout(model, layout, self.axis)
        return vocabulary_layout(model, layout, self.axis) if self.lm_head else layout

    def regions(self, model: nn.Module) -> Iterable[str]:
        modules = attention_modules(model) + (expert_modules(model) if self.experts else [])
        return (path for path, _ in modules)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        mesh, axis, layout = mesh_of(model), self.axis.name, layout_of(model)
        sums = attach_attention(model, mesh, axis, journal) + attach_sliced_experts(model, layout, mesh, axis, journal)
        hidden: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        met = [f"{sums} all-reduces of [tokens, {hidden}], after attention and experts"]
        met += attach_vocabulary(model, layout, mesh, axis, journal)
        return Report(tuple(f"each forward, over axis {axis!r}: {line}" for line in met))


@takes_model
def shard_tensor_parallel(
    *,
    mesh: DeviceMesh | Mapping[str, int] | Shape | None = None,
    degree: int | None = None,
    experts: bool = True,
    lm_head: bool = True,
) -> TensorParallel:
    """Tensor parallelism: each rank holds and computes its part of every layer, for the same tokens.

    Attention is split by heads (q, k, v by column, o by row, sinks by head), the experts along their intermediate
    dimension by whole blocks of 32, unevenly where need be, and embedding and head over the vocabulary. Two all-reduces
    per layer (Shoeybi et al. 2019, Megatron-LM). All ranks must be given the same tokens, and all get the same logits,
    loss and, in `generate`, random numbers. Parameters are DTensors, so that optimizers and `clip_grad_norm_` see the
    true ones; keys and shapes are those of the whole model, and `save_pretrained`, called on every rank, writes an
    ordinary checkpoint. Cannot be undone: what belongs to other ranks is dropped.

    With `shard_experts` on the same ranks, the experts are spread as that says, and this takes the rest.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a wrapper to
            give to `compose` or `load`.
        mesh: one axis of a DeviceMesh, such as `init_distributed((2, 4), ("dp", "tp"))["tp"]`. Along other axes of that
            mesh whose names begin with "dp", gradients are averaged. Or the shape of a mesh of all processes, such as
            {"ep": 2, "tp": 8}, of which this takes "tp": such a wrapper is data, made before there are processes. All
            processes are along one axis, if it is left out.
        degree: how many ranks hold the model together, instead of a mesh: groups of neighbours, data parallel to each
            other.
        experts: split the experts too.
        lm_head: split the vocabulary, that is embedding and head.

    Raises:
        CompatibilityError: there is no process group, heads or sizes do not divide, or ranks disagree; on all ranks.

    Example:
        >>> shard_tensor_parallel(degree=2)
        shard_tensor_parallel(degree=2)

    Under `torchrun --nproc-per-node 2`, after `init_distributed()`: `model = shard_tensor_parallel(model)`, or
    `model = load(path, shard_tensor_parallel())`, which reads each rank's slices only.
    """
    return TensorParallel(mesh=as_data(mesh), degree=degree, experts=experts, lm_head=lm_head)
