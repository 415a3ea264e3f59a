"""The float64 reference of models with adapters: W + s B A made, for each weight, on plain transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.helpers import tiny_model

A, B = "lora_A", "lora_B"


def gentle(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model whose gradients float32 gets right to 2e-6; with larger weights, rounding takes them to 1e-5."""
    return tiny_model(dtype, **{"initializer_range": 0.1, **changes})


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters of the adapters on a model."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith((A, B))}


def begun(model: Any, seed: int = 7, size: float = 0.1) -> Any:
    """The model with second factors that are not zero, so that all gradients are; the same ones on any model."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(adapters(model).items())):
            if name.endswith(B):
                generator = torch.Generator().manual_seed(100 * seed + number)
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


class Materialised:
    """A plain model in float64 whose weights are those of a base and the changes that adapters make.

    Attributes:
        factors: the adapters' parameters by name, in float64, taking gradients.
        own: the base's own parameters, those named in `trained` taking gradients.
    """

    def __init__(self, adapted: nn.Module, scale: float, base: Any = None, trained: str = "nothing") -> None:
        self.plain = (gentle() if base is None else base).double()
        self.plain.set_experts_implementation("eager")
        self.scale = scale
        self.factors = {name: p.detach().double().clone().requires_grad_() for name, p in adapters(adapted).items()}
        self.own = {
            name: p.detach().clone().requires_grad_(trained in name) for name, p in self.plain.named_parameters()
        }

    def weights(self) -> dict[str, Tensor]:
        """All parameters of the plain model, with the changes in."""
        made = dict(self.own)
        for name in self.factors:
            if not name.endswith(A):
                continue
            a, b = self.factors[name], self.factors[name.removesuffix(A) + B]
            of_experts = name.endswith(f"_proj_{A}")
            weight = name.removesuffix(f"_{A}") if of_experts else name.removesuffix(A) + "weight"
            change = self.scale * torch.einsum("...or,...ri->...io" if of_experts else "...or,...ri->...oi", b, a)
            assert change.shape == made[weight].shape
            made[weight] = made[weight] + change
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.plain, self.weights(), args, kwargs)

    def logits(self, input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self(input_ids).logits

    def gradients(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Of the loss of predicting the input, for each factor, and for what else is trained."""
        wanted = {**self.factors, **{name: p for name, p in self.own.items() if p.requires_grad}}
        loss = self(input_ids, labels=kwargs.pop("labels", input_ids), **kwargs).loss
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
