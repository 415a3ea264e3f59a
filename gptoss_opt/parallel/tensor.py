"""Tensor parallelism: attention split by heads, and each expert along its intermediate dimension.

It is that of Megatron-LM (Shoeybi et al. 2019, section 3): a product split by columns, then one split by rows, whose
results are summed. So there are two sums per layer, after attention and after the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..core import Journal
from ..distributed import ModelMesh, Region, refuse_foreign, split
from ..kernels.mxfp4 import BLOCK
from ..layout import Axis, Layout, Split
from ..model.modules import attention_modules, decoder_path, expert_modules
from .dispatch import PartOfExperts, part_of_experts


def why_no_tensor_parallel(model: nn.Module, degree: int, *, experts: bool, vocabulary: bool) -> Iterator[str]:
    """Say what stands in the way of spreading this model over `degree` ranks."""
    config = cast(Any, model).config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % degree or kv_heads % degree:
        kind, count = ("key/value heads", kv_heads) if kv_heads % degree else ("attention heads", heads)
        fitting = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
        use = " or ".join(filter(None, (", ".join(fitting[:-1]), fitting[-1])))
        yield f"{count} {kind} do not divide over {degree} ranks. Use {use}."
    size = config.intermediate_size
    if experts and size % BLOCK:
        yield f"intermediate_size is {size}, no multiple of {BLOCK}, the values that stay together. Use experts=False."
    elif experts and size // BLOCK < degree:
        yield (
            f"intermediate_size {size} has {size // BLOCK} blocks of {BLOCK}, too few for {degree} ranks. "
            "Use experts=False, and shard_experts() for the experts."
        )
    if vocabulary and config.vocab_size < degree:
        yield f"a vocabulary of {config.vocab_size} does not go on {degree} ranks. Use lm_head=False."


def spread(layout: Layout, names: Sequence[str], dim: int, size: int, axis: Axis, unit: int = 1) -> Layout:
    """`layout` with a dimension of `size` spread evenly over an axis, by whole units."""
    return layout.split(names, Split(dim, axis.name, split(size, axis.degree, unit=unit)))


def attention_layout(model: nn.Module, layout: Layout, axis: Axis) -> Layout:
    """`layout` with attention spread over an axis by heads."""
    config = cast(Any, model).config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for path, module in attention_modules(model):
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            rows = count * module.head_dim
            linear = getattr(module, name)
            names = [f"{path}.{name}.{kind}" for kind in ("weight", "bias") if getattr(linear, kind) is not None]
            layout = spread(layout, names, 0, rows, axis, rows // axis.degree)
        columns = heads * module.head_dim
        layout = spread(layout, [f"{path}.o_proj.weight"], 1, columns, axis, columns // axis.degree)
        layout = spread(layout, [f"{path}.sinks"], 0, heads, axis)
        if module.o_proj.bias is not None:
            layout = layout.add_once([f"{path}.o_proj.bias"], axis.name)
    return layout


def sliced_experts_layout(model: nn.Module, layout: Layout, axis: Axis) -> Layout:
    """`layout` with a slice of every expert on each rank, by whole blocks. It gives way to whole experts."""
    size = cast(Any, model).config.intermediate_size
    # Gate and up are interleaved: a block of the intermediate dimension is twice as wide before the activation.
    slices = (("gate_up_proj", 2, 2), ("gate_up_proj_bias", 1, 2), ("down_proj", 1, 1))
    for path, _ in expert_modules(model):
        for name, dim, width in slices:
            parts = split(width * size, axis.degree, unit=width * BLOCK)
            layout = layout.split([f"{path}.{name}"], Split(dim, axis.name, parts, gives_way=True))
        layout = layout.add_once([f"{path}.down_proj_bias"], axis.name)
    return layout


def attach_attention(model: nn.Module, mesh: ModelMesh, axis: str, journal: Journal) -> int:
    """Let the ranks along an axis meet around attention; returns how many sums that are in a forward."""
    modules = attention_modules(model)
    journal.add_pre_hook(model, decoder_path(model), refuse_attentions)
    for path, _ in modules:
        journal.around(model, path, attention_of_heads, Region(mesh, axis))
    return len(modules)


def attach_sliced_experts(model: nn.Module, layout: Layout, mesh: ModelMesh, axis: str, journal: Journal) -> int:
    """Let the ranks along an axis meet around experts of which each has a slice; returns how many sums that are."""
    sliced = [
        path
        for path, _ in expert_modules(model)
        if any((one.axis, one.dim) == (axis, 1) for one in layout.form(f"{path}.down_proj").splits)
    ]
    for path in sliced:
        journal.around(model, path, part_of_experts, PartOfExperts(Region(mesh, axis)))
    return len(sliced)


def attention_of_heads(
    region: Region, module: nn.Module, inner: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Attention of which each rank computes its heads, and the part of the output that these give."""
    refuse_foreign(module)
    output, *others = inner(region.copy_to_region(hidden_states), *args, **kwargs)
    return region.reduce_from_region(output), *others


def refuse_attentions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the decoder that refuses output_attentions."""
    asked = kwargs.get("output_attentions")
    if module.config.output_attentions if asked is None else asked:
        raise ValueError(
            "output_attentions: each rank has the weights of its own heads only. Ask for them of a model that is not "
            "sharded."
        )
