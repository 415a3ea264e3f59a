"""How the experts are reached inside a transformers GPT-OSS model: the experts interface, and their packed storage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from ..core import Attachment, Journal
from ..kernels.experts import (
    DENSE_BACKENDS,
    PACKED_BACKENDS,
    DenseWeights,
    ExpertsRequest,
    Kernel,
    PackedWeights,
    experts,
    is_traced,
    kernel_of,
    torch_backend,
)
from ..kernels.kernel_table import DENSE_EXPERTS, PACKED_EXPERTS, described
from ..kernels.mxfp4 import BLOCK
from ..kernels.native import computes_on
from ..layout import MXFP4
from .changes import change_of
from .host import config_paths
from .modules import NO_LAYERS, WRAPPED, execution_device, expert_modules

KEY = "gptoss_opt:{}"
PROJECTIONS = ("gate_up_proj", "down_proj")

EXPERTS = "the experts computation"
EXPERT_WEIGHTS = "the experts' weights"
"""Slots of a model: see `Wrapper`."""


def expert_parameters(model: nn.Module) -> list[str]:
    """The names of all expert weights of a model, as they are called when dense."""
    return [f"{path}.{projection}" for path, _ in expert_modules(model) for projection in PROJECTIONS]


def experts_request(model: nn.Module) -> ExpertsRequest:
    """What a backend must serve on this model."""
    _, module = expert_modules(model)[0]
    bias, sizes = module.down_proj_bias, (module.hidden_size, module.intermediate_size)
    return ExpertsRequest(execution_device(module, bias).type, bias.dtype, sizes)


def why_no_experts(model: nn.Module) -> Iterator[str]:
    """Say what stands in the way of any other computation of the experts."""
    if any(type(module).__name__ == "Mxfp4GptOssExperts" for module in model.modules()):
        yield (
            "the experts are packed by transformers already, in the layout of its hub kernels, which cannot be read "
            "back. Load the checkpoint with gptoss_opt.load(path, with_mxfp4_experts()) instead."
        )
    elif not getattr(model.config, "num_hidden_layers", 1):
        yield NO_LAYERS
    elif not expert_modules(model):
        yield "this model has no GptOssExperts. Wrap it before its experts are replaced."


def why_experts_wait(model: nn.Module) -> str | None:
    """The reason why computing the experts waits for the GPU that they are on, or None."""
    key = str(cast(PreTrainedModel, model).config._experts_implementation)
    if not key.startswith(KEY.format("")):
        return f"the experts implementation {key!r} may wait for the device: use with_fast_experts"
    request, (_, module) = experts_request(model), expert_modules(model)[0]
    kernels: list[Kernel] = [kernel_of(weights_held(module, "down_proj"), key.removeprefix(KEY.format("")))]
    if any(change_of(module, f"{projection}_") for projection in PROJECTIONS):
        kernels.append(torch_backend(request))
    device = execution_device(module, module.down_proj_bias)
    reasons = (kernel.why_waits(request.dtype, device) for kernel in kernels)
    return next((reason for reason in reasons if reason), None)


def why_experts_stay(model: nn.Module) -> Iterator[str]:
    """Say what holds on to the experts' weights as they are: they can be computed with, but not stored otherwise."""
    for path, _ in expert_modules(model):
        around = model.get_submodule(path.rpartition(".")[0])
        if hasattr(around, "base_layer"):
            name = getattr(around, "parameter_name", "a parameter")
            yield (
                f"{name} of {path} is adapted by a {type(around).__name__} around it (peft's target_parameters), which "
                "needs it dense and whole. Merge the adapter first (merge_and_unload()), or use with_fast_experts()."
            )
            return


def why_no_packing(model: nn.Module) -> Iterator[str]:
    """Say what stands in the way of packing the experts."""
    yield from why_no_experts(model)
    yield from why_experts_stay(model)
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
    for path, _ in expert_modules(model):
        journal.set(model, path, WRAPPED, True)
    changed = f"config._experts_implementation: {before} -> {key}, on the model's own copy of the config"
    return (changed, _native_experts(model)) if backend == "native" else (changed,)


def _native_experts(model: nn.Module) -> str:
    """Which instructions compute the experts, and which kernel up to how many rows, in a sentence."""
    _, module = expert_modules(model)[0]
    projection = DENSE_EXPERTS if isinstance(weights_held(module, "down_proj"), DenseWeights) else PACKED_EXPERTS
    rows = described(projection, module.down_proj_bias.dtype)
    return f"experts: by the native library, on {computes_on()}; {projection}: {rows}"


def fill_experts(model: nn.Module, journal: Attachment) -> tuple[str, ...]:
    """Make the backend chosen for a wrapper compute the model's experts, as `set_experts` does."""
    assert journal.choice is not None
    return set_experts(model, journal.choice.backend, journal)


def fill_experts_if_served(model: nn.Module, journal: Attachment) -> tuple[str, ...]:
    """As `fill_experts`, where the model has experts that a backend serves; any others stay as they are."""
    return fill_experts(model, journal) if journal.choice else ()


def keep_packed(model: nn.Module, journal: Journal) -> None:
    """Let the model count its values, not their bytes, and refuse computations of the experts on dense weights."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            journal.method(model, path, "num_parameters", num_parameters)
            journal.method(model, path, "set_experts_implementation", cannot_set_experts)


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """transformers' `num_parameters`, in which each packed value counts as one."""
    count = int(type(model).num_parameters(model, only_trainable, exclude_embeddings))
    if only_trainable:
        return count
    blocks, scales = MXFP4.suffixes
    for name, parameter in model.named_parameters():
        # A byte of blocks holds two values, and one of scales none.
        count += parameter.numel() * (name.endswith(blocks) - name.endswith(scales))
    return count


def cannot_set_experts(model: object, experts_implementation: object) -> None:
    """Stand in for `set_experts_implementation` of a model whose experts are packed."""
    raise ValueError(
        f"set_experts_implementation({experts_implementation!r}): the experts are packed as MXFP4, and transformers' "
        "implementations compute with dense weights. Give them back first: undo(model, with_mxfp4_experts)."
    )


def check_implementation(module: Any, what: str, wrapper: str) -> None:
    """Raise `ValueError` unless the experts are computed here: other computations know nothing of `what`."""
    name = module.config._experts_implementation
    if not str(name).startswith(KEY.format("")):
        raise ValueError(
            f"the experts implementation {name!r} knows nothing of {what}. Leave the one that {wrapper} has set, or "
            f"apply it again: {wrapper}(model)."
        )


def weights_held(module: Any, projection: str) -> DenseWeights | PackedWeights:
    """The weights of one projection as the module holds them."""
    # Attributes, not parameters: of a sharded model they are what this rank holds.
    bias = getattr(module, f"{projection}_bias")
    # A parametrisation, such as PEFT's on a parameter, leaves the attribute only.
    if f"{projection}_blocks" not in module._parameters:
        return DenseWeights(getattr(module, projection), bias)
    return PackedWeights(getattr(module, f"{projection}_blocks"), getattr(module, f"{projection}_scales"), bias)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str
) -> Tensor:
    """transformers' experts interface: `hidden_states` [T, H], indices and weights [T, K]."""
    if WRAPPED not in module.__dict__:
        # It has the config of a wrapped model, but no wrapper is on it.
        return cast(Tensor, GptOssExperts.forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights))  # type: ignore[attr-defined]
    # Of a packed one each look would be a call of `Codes`.
    with torch._C.DisableTorchFunctionSubclass():
        return _experts(module, hidden_states, top_k_index, top_k_weights, backend)


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, backend: str) -> Tensor:
    gate_up, down = weights_held(module, "gate_up_proj"), weights_held(module, "down_proj")
    changes = change_of(module, "gate_up_proj_"), change_of(module, "down_proj_")
    # On a GPU this would wait for it. Below 0 are experts of other ranks.
    if top_k_index.is_cpu and top_k_index.numel() and not is_traced(top_k_index):
        last, num_experts = int(top_k_index.max()), gate_up.shape[0]
        if last >= num_experts:
            raise IndexError(f"router_indices has expert {last}, and there are {num_experts}: 0 to {num_experts - 1}.")
    options = {"alpha": module.alpha, "limit": module.limit, "backend": backend, "changes": changes}
    return experts(hidden_states, top_k_index, top_k_weights, gate_up, down, **options)


for _name in dict.fromkeys(backend.name for backend in (*PACKED_BACKENDS, *DENSE_BACKENDS)):
    ALL_EXPERTS_FUNCTIONS.register(KEY.format(_name), partial(experts_forward, backend=_name))
