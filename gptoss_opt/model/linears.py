"""The linear layers of a GPT-OSS model: q, k, v, o and the head, as far as they are plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..core.journal import Around, Journal
from ..kernels.linear import LinearRequest, is_faster, linear, max_rows
from .modules import Named, execution_device

LINEARS = "the linear layers"
"""A slot of a model: see `Wrapper`."""


def linear_modules(model: nn.Module) -> Named:
    """All that compute as `nn.Linear` does."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    ]


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
    modules = linear_modules(model)
    for path, _ in modules:
        journal.around(model, path, few_rows_faster, None)
    names = dict.fromkeys(path.rpartition(".")[2] for path, _ in modules)
    most = max_rows(linear_request(model).dtype)
    yield f"{', '.join(names)} ({len(modules)}): up to {most} rows by the native library, unless gradients are recorded"


def few_rows_faster(_: None, module: Any, inner: Callable[..., Tensor], input: Tensor) -> Tensor:
    """A linear layer's forward, natively where that is faster."""
    # Attributes, not parameters: of a sharded model they are what this rank holds.
    weight, bias = module.weight, module.bias
    return linear(input, weight, bias) if is_faster(input, weight, bias) else inner(input)


def without_faster(inner: Callable[..., Any]) -> Callable[..., Any]:
    """A linear layer's forward as it was before `set_linears`, of which it computes the same function."""
    return inner.inner if isinstance(inner, Around) and inner.function is few_rows_faster else inner
