"""The linear layers of a GPT-OSS model: q, k, v, o, router and head, as far as they are plain ones, and the norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter

from ..core.journal import Around, Journal
from ..kernels.kernel_table import described, is_ever_native
from ..kernels.linear import LinearRequest, is_faster, product
from ..kernels.norm import is_served, rms_norm
from .modules import Named, execution_device, is_plain, own_forward

LINEARS = "the linear layers"
"""A slot of a model: see `Wrapper`."""

NORMS = "the norms"
"""A slot of a model."""

Forward = Callable[..., Any]
LINEAR, ROUTER, NORM = (own_forward(cls) for cls in (nn.Linear, GptOssTopKRouter, GptOssRMSNorm))
"""The forwards of which the native library computes the same function."""


def linear_modules(model: nn.Module) -> Named:
    """All that compute as `nn.Linear` does."""
    return _computing_as(LINEAR, model)


def _computing_as(forward: Forward | None, model: nn.Module) -> Named:
    """The modules with this forward."""
    return [(path, module) for path, module in model.named_modules() if type(module).forward is forward]


def linear_request(model: nn.Module) -> LinearRequest:
    """What a backend must serve on this model."""
    _, module = linear_modules(model)[0]
    return LinearRequest(execution_device(module, module.weight).type, module.weight.dtype)


def why_no_linears(model: nn.Module) -> Iterator[str]:
    """Say that a model has no linear layers."""
    if not linear_modules(model):
        yield "this model has no plain linear layers (nn.Linear). Wrap it before they are replaced, or leave this out."


def set_linears(model: nn.Module, journal: Journal) -> Iterator[str]:
    """Let linear layers compute few rows by the native library; says what was changed, in sentences."""
    dtype = linear_request(model).dtype
    for forward, function in ((LINEAR, few_rows_faster), (ROUTER, few_rows_routed)):
        named: dict[str, list[str]] = {}
        for path, _ in _computing_as(forward, model):
            named.setdefault(path.rpartition(".")[2], []).append(path)
        for projection, paths in named.items():
            if not is_ever_native(projection, dtype):
                continue
            for path in paths:
                journal.around(model, path, function, projection)
            yield f"{projection} ({len(paths)}): {described(projection, dtype)}, unless it trains"
    norms = _computing_as(NORM, model)
    for path, _ in norms:
        journal.around(model, path, natively_normed, None)
    yield f"norms ({len(norms)}): native, unless they train"


def few_rows_faster(projection: str, module: Any, inner: Callable[..., Tensor], input: Tensor) -> Tensor:
    """A linear layer's forward, natively where that is faster."""
    # Attributes, not parameters: of a sharded model they are what this rank holds.
    weight, bias = module.weight, module.bias
    ours = is_plain(module, inner, LINEAR) and is_faster(projection, input, weight, bias)
    return product(input, weight, bias) if ours else inner(input)


def few_rows_routed(
    projection: str, module: Any, inner: Callable[..., tuple[Tensor, ...]], hidden_states: Tensor
) -> tuple[Tensor, ...]:
    """A router's forward, with its product natively where that is faster: logits, weights and indices of experts."""
    weight, bias = module.weight, module.bias
    if not (is_plain(module, inner, ROUTER) and is_faster(projection, hidden_states, weight, bias)):
        return inner(hidden_states)
    logits = product(hidden_states, weight, bias)
    return logits, *most_probable(logits, module.top_k)


def most_probable(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The weights of the experts that a router chooses, and which they are, as transformers has them: [T, K] each."""
    values, indices = torch.topk(logits, top_k, dim=-1)
    return torch.softmax(values, dim=1, dtype=values.dtype), indices


def natively_normed(_: None, module: Any, inner: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    """A norm's forward, natively where nothing needs torch's operations."""
    if not (is_plain(module, inner, NORM) and is_served(hidden_states, module.weight)):
        return inner(hidden_states)
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def without_faster(inner: Callable[..., Any]) -> Callable[..., Any]:
    """A linear layer's forward as it was before `set_linears`, of which it computes the same function."""
    return inner.inner if isinstance(inner, Around) and inner.function is few_rows_faster else inner
