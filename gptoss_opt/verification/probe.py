"""What the parts of a model are given and give while it runs: recorded by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


PLAIN_OUTPUT = {"return_dict": True, "output_router_logits": False}
"""Whatever the config says."""

STEPS = 3
"""How many tokens are decoded on a cache."""

Calls = dict[nn.Module, list[Call]]


@contextmanager
def recording(modules: list[nn.Module]) -> Iterator[Calls]:
    """Record all calls of these modules meanwhile."""
    calls: Calls = {module: [] for module in modules}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls[module].append(Call(args, dict(kwargs), out))

    # Before the user's own hooks, which may change what a module gives.
    handles = [module.register_forward_hook(hook, with_kwargs=True, prepend=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode meanwhile."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def implementation(config: Any, name: str, value: str) -> Iterator[None]:
    """Let a config name another implementation meanwhile."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


@torch.no_grad()
def run_whole(model: Any, tokens: Tensor, seen: Tensor) -> None:
    """One forward of all tokens."""
    model(tokens, attention_mask=seen.long(), position_ids=positions(seen), use_cache=False, **PLAIN_OUTPUT)


@torch.no_grad()
def run_in_steps(model: Any, tokens: Tensor, seen: Tensor, steps: int = STEPS) -> Tensor:
    """All but the last tokens in one forward, and those one by one on its cache; the logits of the steps."""
    places, first = positions(seen), tokens.shape[1] - steps
    cache, logits = None, []
    for begin, end in [(0, first), *((at, at + 1) for at in range(first, tokens.shape[1]))]:
        out = model(
            tokens[:, begin:end],
            attention_mask=seen[:, :end].long(),
            position_ids=places[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            **PLAIN_OUTPUT,
        )
        cache = out.past_key_values
        logits.append(out.logits[:, -1:])
    return torch.cat(logits[1:], 1)


def positions(seen: Tensor) -> Tensor:
    """The positions [B, T] of tokens, padding aside, as `generate` counts them."""
    return (seen.long().cumsum(-1) - 1).clamp(min=0)


def first_tensor(out: Any) -> Tensor:
    """A result, or the first of several."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found
