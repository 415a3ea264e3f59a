"""How the experts are reached inside a transformers GPT-OSS model: the experts interface, and their packed storage."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from ..core import STORAGES, Journal, Sliced, Split, Stored
from ..kernels import memory
from ..kernels.experts import DENSE_BACKENDS, PACKED_BACKENDS, DenseWeights, ExpertsRequest, PackedWeights, experts
from ..kernels.mxfp4 import BLOCK, pack, unpack
from .host import config_paths

KEY = "gptoss_opt:{}"
PROJECTIONS = ("gate_up_proj", "down_proj")

QUANTIZATION_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""What the released checkpoints say of their weights in config.json."""


class Mxfp4:
    """Expert weights as in the released checkpoints: dense `[E, in, out]` as blocks and scales of `[E, out, in]`."""

    name: str = "mxfp4"
    suffixes: tuple[str, ...] = ("_blocks", "_scales")

    def encode(self, dense: Sliced) -> Stored:
        """Quantise, one expert at a time."""
        num_experts, num_in, num_out = dense.shape
        shape = (num_experts, num_out, num_in // BLOCK)
        blocks = memory.empty((*shape, BLOCK // 2), torch.uint8, dense.device)
        scales = memory.empty(shape, torch.uint8, dense.device)
        signal = noise = 0.0
        for e in range(num_experts):
            rows = dense[e].T
            blocks[e], scales[e] = pack(rows)
            exact = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
            error = exact - unpack(blocks[e], scales[e], exact.dtype)
            signal += float(exact.square().sum(dtype=torch.float64))
            noise += float(error.square().sum(dtype=torch.float64))
        sqnr = 10 * math.log10(signal / noise) if noise else math.inf
        return Stored({"_blocks": blocks, "_scales": scales}, sqnr)

    def decode(self, tensors: Mapping[str, Sliced], dtype: torch.dtype) -> Tensor:
        """Dequantise, one expert at a time."""
        blocks, scales = tensors["_blocks"], tensors["_scales"]
        num_experts, num_out, num_blocks = scales.shape
        dense = memory.empty((num_experts, num_blocks * BLOCK, num_out), dtype, blocks.device)
        for e in range(num_experts):
            dense[e] = unpack(blocks[e], scales[e], dtype).T
        return dense

    def split(self, split: Split) -> Split:
        """`[E, in, out]` as it is in `[E, out, in / 32]`."""
        if split.dim != 1:
            return replace(split, dim={0: 0, 2: 1}[split.dim])
        if any(not isinstance(part, range) or part.start % BLOCK or part.stop % BLOCK for part in split.parts):
            raise ValueError(f"MXFP4 packs {BLOCK} values of a row together, and the parts {split.parts} tear them.")
        blocks = (range(part.start // BLOCK, part.stop // BLOCK) for part in split.parts if isinstance(part, range))
        return replace(split, dim=2, parts=tuple(blocks))

    def num_bytes(self, num_values: int, itemsize: int) -> int:
        """Half a byte for each value, and one for the scale of each block."""
        return num_values * (BLOCK // 2 + 1) // BLOCK


MXFP4 = Mxfp4()
STORAGES[MXFP4.name] = MXFP4


def expert_parameters(model: nn.Module) -> list[str]:
    """The names of all expert weights of a model, as they are called when dense."""
    return [
        f"{path}.{projection}" if path else projection
        for path, module in model.named_modules()
        if isinstance(module, GptOssExperts)
        for projection in PROJECTIONS
    ]


def experts_request(model: nn.Module) -> ExpertsRequest:
    """What a backend must serve on this model."""
    module = next(module for module in model.modules() if isinstance(module, GptOssExperts))
    bias, sizes = module.down_proj_bias, (module.hidden_size, module.intermediate_size)
    return ExpertsRequest(bias.device.type, bias.dtype, sizes)


def why_no_experts(model: nn.Module) -> Iterator[str]:
    """What stands in the way of any other computation of the experts."""
    if any(type(module).__name__ == "Mxfp4GptOssExperts" for module in model.modules()):
        yield (
            "the experts are packed by transformers already, in the layout of its hub kernels, which cannot be read "
            "back. Load the checkpoint with gptoss_opt.load(path, with_mxfp4_experts()) instead."
        )
    elif not any(isinstance(module, GptOssExperts) for module in model.modules()):
        yield "this model has no GptOssExperts. Wrap it before its experts are replaced."


def why_no_packing(model: nn.Module) -> Iterator[str]:
    """What stands in the way of packing the experts."""
    yield from why_no_experts(model)
    config = cast(PreTrainedModel, model).config
    for size in ("hidden_size", "intermediate_size"):
        if getattr(config, size) % BLOCK:
            yield f"{size} is {getattr(config, size)}, and MXFP4 packs rows of a multiple of {BLOCK}."
    if getattr(config, "quantization_config", None) is not None:
        yield "config.quantization_config says that the model is quantised already. Load it dense, or with load()."


def set_experts(model: nn.Module, backend: str, journal: Journal) -> tuple[str, ...]:
    """Make `backend` compute the model's experts; returns what was changed, as sentences."""
    before, key = cast(PreTrainedModel, model).config._experts_implementation, KEY.format(backend)
    for path in config_paths(model):
        journal.set(model, path, "_experts_implementation", key)
    return (f"config._experts_implementation: {before} -> {key}, on the model's own copy of the config",)


def set_packed_format(model: nn.Module, journal: Journal) -> tuple[str, ...]:
    """Make `save_pretrained` write the released format; returns what was changed, as sentences."""
    for path in config_paths(model):
        journal.set(model, path, "quantization_config", copy.deepcopy(QUANTIZATION_CONFIG))
    # What from_pretrained did to the weights on loading, and save_pretrained would do the other way round.
    journal.set(model, "", "_weight_conversions", [])
    return ("config.quantization_config: mxfp4, so that save_pretrained writes the released format",)


def _weights(module: Any, projection: str) -> DenseWeights | PackedWeights:
    # Attributes, not parameters: of a sharded model they are what this rank holds.
    bias = getattr(module, f"{projection}_bias")
    if projection in module._parameters:
        return DenseWeights(getattr(module, projection), bias)
    return PackedWeights(getattr(module, f"{projection}_blocks"), getattr(module, f"{projection}_scales"), bias)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str
) -> Tensor:
    """transformers' experts interface: `hidden_states` [T, H], indices and weights [T, K]."""
    return experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        _weights(module, "gate_up_proj"),
        _weights(module, "down_proj"),
        alpha=module.alpha,
        limit=module.limit,
        backend=backend,
    )


for _name in dict.fromkeys(backend.name for backend in (*PACKED_BACKENDS, *DENSE_BACKENDS)):
    ALL_EXPERTS_FUNCTIONS.register(KEY.format(_name), partial(experts_forward, backend=_name))
