"""How a GPT-OSS model is served: its layers by kind, the shape of its keys, and a packed forward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from ..core import mesh_of
from ..kernels.paged_attention import Paged
from .attention import KEY
from .experts import why_experts_wait
from .host import GPT_OSS


@dataclass(frozen=True)
class KeyShape:
    """The keys of one token in one layer, as this rank holds them; values are alike.

    Attributes:
        num_heads: how many key heads there are.
        group_size: how many query heads share a key head.
        head_dim, dtype, device: those of the keys.
    """

    num_heads: int
    group_size: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """What keys and values take together."""
        return 2 * self.num_heads * self.head_dim * self.dtype.itemsize


def why_not_served(model: nn.Module) -> Iterator[str]:
    """The reasons why this model cannot be served."""
    if reason := GPT_OSS.why_not(model):
        yield reason
        return
    if not cast(PreTrainedModel, model).can_generate():
        yield f"{type(model).__name__} generates no text: give a GptOssForCausalLM."
        return
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        yield f"its parameters are on {' and '.join(devices)}: move the model to one device, or shard it."
    elif devices == ["meta"]:
        yield "its parameters are on the meta device and hold nothing: load the weights first."


def reads_pages(model: nn.Module) -> bool:
    """Whether attention reads pages: whether with_flash_attention is on."""
    return str(cast(Any, model).config._attn_implementation).startswith(KEY.format(""))


def kinds_of_layers(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """The numbers of the layers of each kind, and their window (None: they see all)."""
    found: dict[str, list[Any]] = {}
    for layer in cast(Any, model).base_model.layers:
        found.setdefault(layer.self_attn.layer_type, []).append(layer.self_attn)
    return {kind: (tuple(one.layer_idx for one in some), some[0].sliding_window) for kind, some in found.items()}


def key_shape(model: nn.Module) -> KeyShape:
    """The shape of this model's keys."""
    attention = cast(Any, model).base_model.layers[0].self_attn
    weight = attention.k_proj.weight
    mesh = mesh_of(model)
    if mesh is not None and mesh.holds(weight):
        weight = mesh.local(weight)
    num_heads = weight.shape[0] // attention.head_dim
    return KeyShape(num_heads, attention.num_key_value_groups, attention.head_dim, weight.dtype, weight.device)


def why_not_captured(model: nn.Module) -> str | None:
    """The reason why a step cannot be captured in a CUDA graph, or None."""
    if mesh_of(model) is not None:
        return "ranks hold the model together"
    return why_experts_wait(model)


_STEPS = [0]
"""How many steps optimizers have made in this process: fused ones change weights that count no versions."""


def _count_step(*_: object) -> None:
    _STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


class WeightsWatch:
    """Notices that a model computes otherwise than when it was last asked: its weights, adapters or modules changed.

    What is written into `parameter.data` or into its memory behind torch's back is not noticed.
    """

    ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    """What the layers of peft say of the adapters on them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._look()
        self._state = self._now()

    def changed(self) -> bool:
        """Whether it did. Reads no weight: version counters, addresses and switches tell."""
        now = self._now()
        if now == self._state:
            return False
        self._look()
        self._state = self._now()
        return True

    def _look(self) -> None:
        modules = [*self.model.modules()]
        self._children = [module._modules for module in modules if module._modules]
        self._tensors = [held for one in modules for held in (one._parameters, one._buffers) if held]
        held = (tensor for one in self._tensors for tensor in one.values() if tensor is not None)
        # Those of inference mode count no versions.
        self._counting = [tensor for tensor in held if not tensor.is_inference()]
        self._adapters = [vars(module) for module in modules if "_disable_adapters" in vars(module)]

    def _now(self) -> tuple[Any, ...]:
        children = [id(child) for one in self._children for child in one.values()]
        tensors = [tensor for one in self._tensors for tensor in one.values() if tensor is not None]
        switches = [copy.copy(one.get(name)) for one in self._adapters for name in self.ADAPTERS]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [tensor._version for tensor in self._counting]
            return children, [*map(id, tensors)], versions, [*map(Tensor.data_ptr, tensors)], switches, _STEPS[0]


def packed_forward(
    model: nn.Module, tokens: Tensor, positions: Tensor, paged: dict[str, Paged], last: Tensor
) -> Tensor:
    """The logits [S, V] after `last` [S], of the packed tokens [T]. `paged` says what they see, by kind of layer."""
    out = model(
        input_ids=tokens[None],
        position_ids=positions[None],
        # A dict by kind is handed to the layers as it is.
        attention_mask=paged,
        use_cache=False,
        logits_to_keep=last,
    )
    return cast(Tensor, out.logits[0])


@contextmanager
def keeping_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """A block in which this thread's forwards of a model leave the hidden states [T, D] before its head in a list."""
    kept: list[Tensor] = []
    decoder: nn.Module = cast(Any, model).base_model
    thread = threading.get_ident()

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == thread:
            kept.append(out[0][0])

    handle = decoder.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """The logits [S, V] of hidden states [S, D]."""
    return cast(Tensor, cast(Any, model).get_output_embeddings()(hidden[None])[0])
