"""What of a GPT-OSS model is spread over ranks, and where the ranks meet: tensor and expert parallelism.

Tensor parallelism is that of Megatron-LM (Shoeybi et al. 2019, section 3): a product split by columns, then one split
by rows, whose results are summed. So there are two sums per layer, after attention and after the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssExperts

from ..core import Journal, Layout, Part, Split
from ..distributed import ModelMesh, Sum, all_gather_last, attributes, split
from ..kernels.mxfp4 import BLOCK
from .dispatch import PartOfExperts, Placement, dispatched, part_of_experts


def _named(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Any]]:
    return [(f"{path}." if path else "", module) for path, module in model.named_modules() if isinstance(module, kind)]


def why_no_tensor_parallel(model: nn.Module, degree: int, *, experts: bool, vocabulary: bool) -> Iterator[str]:
    """What stands in the way of spreading this model over `degree` ranks."""
    config = cast(PreTrainedModel, model).config
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


def tensor_parallel_layout(
    model: nn.Module, layout: Layout, axis: str, degree: int, *, experts: bool, vocabulary: bool
) -> Layout:
    """`layout` with the model spread over an axis: attention by heads, experts along the intermediate dimension, and
    the vocabulary. Experts that are spread over that axis already stay so."""
    config = cast(PreTrainedModel, model).config

    def spread(layout: Layout, names: Sequence[str], dim: int, size: int, unit: int = 1) -> Layout:
        return layout.split(names, Split(dim, axis, tuple(split(size, degree, unit=unit))))

    for path, module in _named(model, GptOssAttention):
        for name, heads in (("q", config.num_attention_heads), ("k", kv := config.num_key_value_heads), ("v", kv)):
            rows = heads * module.head_dim
            present = [f"{path}{name}_proj.{kind}" for kind in ("weight", "bias") if _has(module, f"{name}_proj", kind)]
            layout = spread(layout, present, 0, rows, rows // degree)
        columns = config.num_attention_heads * module.head_dim
        layout = spread(layout, [f"{path}o_proj.weight"], 1, columns, columns // degree)
        layout = spread(layout, [f"{path}sinks"], 0, config.num_attention_heads)
        if _has(module, "o_proj", "bias"):
            layout = layout.add_once([f"{path}o_proj.bias"], axis)
    for path, _ in _named(model, GptOssExperts) if experts else ():
        if axis in {one.axis for one in layout.form(f"{path}down_proj").splits}:
            continue
        size = config.intermediate_size
        # Gate and up are interleaved: a block of the intermediate dimension is twice as wide before the activation.
        layout = spread(layout, [f"{path}gate_up_proj"], 2, 2 * size, 2 * BLOCK)
        layout = spread(layout, [f"{path}gate_up_proj_bias"], 1, 2 * size, 2 * BLOCK)
        layout = spread(layout, [f"{path}down_proj"], 1, size, BLOCK)
        layout = layout.add_once([f"{path}down_proj_bias"], axis)
    if vocabulary:
        for path, module in _vocabulary(model):
            layout = spread(layout, [f"{path}.weight"], 0, module.weight.shape[0])
    return layout


def _has(module: nn.Module, name: str, parameter: str) -> bool:
    return getattr(getattr(module, name), parameter, None) is not None


def _vocabulary(model: nn.Module) -> list[tuple[str, Any]]:
    """The embedding, and the head if it is over the vocabulary."""
    found = [cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()]
    paths = {module: path for path, module in model.named_modules()}
    return [(paths[module], module) for module in found if module is not None]


def placements_of(model: nn.Module, degree: int, placement: str | Sequence[Placement]) -> list[Placement]:
    """The experts that each rank holds, layer by layer."""
    if not isinstance(placement, str):
        return list(placement)
    return [
        tuple(tuple(part) for part in split(module.num_experts, degree)) for _, module in _named(model, GptOssExperts)
    ]


def why_no_expert_parallel(model: nn.Module, degree: int, placement: str | Sequence[Placement]) -> Iterator[str]:
    """What stands in the way of spreading the experts over `degree` ranks."""
    num_experts = cast(Any, model).config.num_local_experts
    layers = len(_named(model, GptOssExperts))
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


def expert_parallel_layout(model: nn.Module, layout: Layout, axis: str, placements: Sequence[Placement]) -> Layout:
    """`layout` with the experts of each layer spread over an axis."""
    for (path, module), placement in zip(_named(model, GptOssExperts), placements, strict=True):
        parts: tuple[Part, ...] = tuple(_as_range(experts) for experts in placement)
        names = [f"{path}{name}" for name, _ in module.named_parameters(recurse=False)]
        dense = dict.fromkeys(name.removesuffix("_blocks").removesuffix("_scales") for name in names)
        layout = layout.split(dense, Split(0, axis, parts))
    return layout


def _as_range(experts: Sequence[int]) -> Part:
    whole = range(experts[0], experts[-1] + 1)
    return whole if len(whole) == len(experts) else tuple(experts)


def attach_tensor_parallel(
    model: nn.Module, layout: Layout, mesh: ModelMesh, axis: str, journal: Journal
) -> tuple[str, ...]:
    """Let the ranks along an axis meet where the finished layout asks for it; returns the collectives, as sentences."""
    hidden, added = cast(PreTrainedModel, model).config.hidden_size, Sum(mesh, axis)
    attention, experts = _named(model, GptOssAttention), 0
    decoder = cast(PreTrainedModel, model).base_model
    path = next(path for path, module in model.named_modules() if module is decoder)
    journal.add_pre_hook(model, path, refuse_attentions)
    for path, _ in attention:
        journal.around(model, path.removesuffix("."), attention_of_heads, added)
        journal.around(model, f"{path}o_proj", summed, added)
    for path, _ in _named(model, GptOssExperts):
        if _split_by(layout, f"{path}down_proj", axis, 1):
            journal.around(model, path.removesuffix("."), part_of_experts, PartOfExperts(added))
            experts += 1
    per_forward = [f"{len(attention) + experts} all-reduces of [tokens, {hidden}], after attention and experts"]
    for path, module in _vocabulary(model):
        vocabulary = next((one for one in layout.form(f"{path}.weight").splits if one.axis == axis), None)
        if vocabulary is None:
            continue
        data = Vocabulary(added, tuple(part for part in vocabulary.parts if isinstance(part, range)))
        if isinstance(module, nn.Embedding):
            journal.around(model, path, embedding_of_part, data)
            per_forward.append(f"1 all-reduce of [tokens, {hidden}], after the embedding")
        else:
            journal.around(model, path, logits_of_parts, data)
            per_forward.append(f"1 all-gather of [tokens, {vocabulary.size}], the logits")
    return tuple(f"each forward, over axis {axis!r}: {line}" for line in per_forward)


def attach_expert_parallel(
    model: nn.Module, layout: Layout, mesh: ModelMesh, axis: str, dispatch: str, journal: Journal
) -> tuple[str, ...]:
    """Let the ranks along an axis meet around the experts; returns the collectives, as sentences."""
    hidden, layers = cast(PreTrainedModel, model).config.hidden_size, _named(model, GptOssExperts)
    for path, module in layers:
        placement = next(one for one in layout.form(f"{path}down_proj").splits if one.axis == axis)
        held = tuple(tuple(part) for part in placement.parts)
        data = PartOfExperts.of(Sum(mesh, axis), held, module.down_proj_bias.device)
        around: Callable[..., Any] = part_of_experts if dispatch == "all_reduce" else dispatched
        journal.around(model, path.removesuffix("."), around, data)
    if dispatch == "all_reduce":
        return (
            f"each forward, over axis {axis!r}: {len(layers)} all-reduces of [tokens, {hidden}], after the experts",
        )
    line = f"{len(layers)} times all-to-all of [routes, {hidden}] to the experts and back, and of the counts"
    return (f"each forward, over axis {axis!r}: {line}",)


def _split_by(layout: Layout, parameter: str, axis: str, dim: int) -> bool:
    return any((one.axis, one.dim) == (axis, dim) for one in layout.form(parameter).splits)


def attention_of_heads(
    added: Sum, module: nn.Module, inner: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Attention of this rank's heads."""
    return inner(added.into(hidden_states), *args, **kwargs)


def refuse_attentions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the decoder."""
    asked = kwargs.get("output_attentions")
    if module.config.output_attentions if asked is None else asked:
        raise ValueError(
            "output_attentions: each rank has the weights of its own heads only. Ask for them of a model that is not "
            "sharded."
        )


def summed(added: Sum, module: nn.Module, inner: Callable[..., Tensor], input: Tensor) -> Tensor:
    """A product of which each rank has some columns of the input."""
    return added.out(inner(input))


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of each rank."""

    added: Sum
    parts: tuple[range, ...]

    @property
    def mine(self) -> range:
        """Those of this rank."""
        return self.parts[self.added.rank]

    @property
    def size(self) -> int:
        """Of the whole vocabulary."""
        return self.parts[-1].stop


def embedding_of_part(data: Vocabulary, module: Any, inner: Callable[..., Tensor], input: Tensor) -> Tensor:
    """The embedding of which each rank has some rows."""
    mine, padding = data.mine, module.padding_idx
    if input.is_cpu and not torch.compiler.is_compiling() and bool(((input < 0) | (input >= data.size)).any()):
        raise IndexError(f"a token id is outside the vocabulary of {data.size}.")
    here = (input >= mine.start) & (input < mine.stop)
    local = torch.where(here, input - mine.start, 0)
    inside = padding - mine.start if padding is not None and padding in mine else None
    with attributes(module, {"padding_idx": inside}):
        rows = inner(local)
    return data.added.out(rows.masked_fill(~here[..., None], 0))


def logits_of_parts(data: Vocabulary, module: nn.Module, inner: Callable[..., Tensor], input: Tensor) -> Tensor:
    """The logits of which each rank computes some."""
    return all_gather_last(inner(data.added.into(input)), [len(part) for part in data.parts], data.added.group)
