"""A wrapper of the tests' own, as users write them: low-rank parameters beside the projections of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gptoss_opt.extend import GPT_OSS, Attachment, Host, Layout, Phase, Report, Wrapper

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True, repr=False)
class LowRank(Wrapper):
    """Adds `x A^T B^T` to what each projection of attention gives; A begins at random, B with zeros."""

    rank: int = 2

    name: ClassVar[str] = "with_toy_low_rank"
    phase: ClassVar[Phase] = Phase.ADAPT
    host: ClassVar[Host] = GPT_OSS

    def linears(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        return ((path, module) for path, module in model.named_modules() if path.endswith(PROJECTIONS))

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        for path, module in self.linears(model):
            weight, like = f"{path}.weight", {"beside": f"{path}.weight", "dtype": module.weight.dtype}
            num_out, num_in = layout.form(weight).shape
            layout = layout.add(f"{path}.low_A", (self.rank, num_in), init="kaiming_uniform", dims={1: 1}, **like)
            layout = layout.add(f"{path}.low_B", (num_out, self.rank), dims={0: 0}, **like)
        return layout

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        for path, _ in self.linears(model):
            journal.around(model, path, with_low_rank, None)
        return Report(("attention: low-rank parameters beside each projection",))


def with_low_rank(_: None, module: Any, inner: Any, x: Tensor) -> Tensor:
    return inner(x) + x @ module.low_A.T @ module.low_B.T


def low_rank_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters that the wrapper brought."""
    return {name: parameter for name, parameter in model.named_parameters() if ".low_" in name}


def train(model: nn.Module, batches: list[Tensor]) -> None:
    """One step on each batch, of all that takes gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for batch in batches:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
