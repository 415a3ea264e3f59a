"""`with_full_finetuning`: every parameter is trained, with checkpointed layers and grouped experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..core import Attachment, Choice, Filler, Host, Phase, Report, Wrapper, choose, takes_model
from ..kernels.experts import DENSE_BACKENDS
from ..model.experts import EXPERTS, experts_request, fill_experts, why_no_experts
from ..model.host import GPT_OSS
from ..model.training import (
    TRAINED,
    add_router_loss,
    checkpoint_layers,
    train_all,
    why_no_router_loss,
    why_not_trained,
)
from ..model.training_memory import OPTIMIZERS, training_memory


@dataclass(frozen=True, kw_only=True, repr=False)
class FullFinetuning(Wrapper):
    """What `with_full_finetuning` builds. Options: `gradient_checkpointing`, `router_aux_loss`, `optimizer_state`."""

    gradient_checkpointing: bool = True
    router_aux_loss: float | None = None
    optimizer_state: str | None = None

    name: ClassVar[str] = "with_full_finetuning"
    phase: ClassVar[Phase] = Phase.ADAPT
    host: ClassVar[Host] = GPT_OSS
    claims: ClassVar[tuple[str, ...]] = (TRAINED,)
    defaults: ClassVar[Mapping[str, Filler]] = {EXPERTS: fill_experts}
    refuses: ClassVar[Mapping[str, str]] = {
        "packed experts": (
            "packed weights take no gradient. undo(model, with_mxfp4_experts), or use with_lora() instead."
        )
    }

    def __post_init__(self) -> None:
        weight, state = self.router_aux_loss, self.optimizer_state
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(f"{self.name}: router_aux_loss is {weight}. Give a weight of 0 or more, or None.")
        if state is not None and state not in OPTIMIZERS:
            known = ", ".join(map(repr, OPTIMIZERS))
            raise ValueError(f"{self.name}: the memory of optimizer_state {state!r} is not known. Use one of {known}.")

    def check(self, model: nn.Module) -> Iterable[str]:
        router = why_no_router_loss(model) if self.router_aux_loss is not None else ()
        return *why_no_experts(model), *why_not_trained(model), *router

    def choice(self, model: nn.Module) -> Choice:
        return choose(DENSE_BACKENDS, experts_request(model), "auto", self.name)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        changed = [train_all(model, journal)]
        if self.gradient_checkpointing:
            changed.append(checkpoint_layers(model, journal))
        if self.router_aux_loss is not None:
            changed.append(add_router_loss(model, self.router_aux_loss, journal))
        return Report((*changed, training_memory(model, OPTIMIZERS[self.optimizer_state or "adamw"])))


@takes_model
def with_full_finetuning(
    *,
    gradient_checkpointing: bool = True,
    router_aux_loss: float | None = None,
    optimizer_state: str | None = None,
) -> FullFinetuning:
    """Training of all parameters: all take gradients, layers are checkpointed, and experts are grouped products.

    Keeps weights, checkpoint and `generate` as they are, and changes no number: losses and gradients are those of
    transformers. Any optimizer, training loop, `Trainer` or `accelerate` goes on from there, on one process, in DDP, in
    FSDP2 (`fully_shard` after wrapping), and with `shard_tensor_parallel` and `shard_experts`. Packed experts take no
    gradient, and are refused. `explain` names the memory of weights, gradients and optimizer state on this rank, for
    the dtypes that the parameters have when the model is wrapped. `undo` gives each parameter its flag back.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a
            wrapper to give to `compose` or `load`.
        gradient_checkpointing: in training mode, each layer keeps its input alone, [batch, len, hidden], and is
            computed again in the backward pass (Chen et al. 2016), without a cache. False leaves it as it is.
        router_aux_loss: what the router's load balancing loss (Fedus et al. 2021, Switch Transformer, equations 4 to 6)
            counts in the loss, 0 or more; the released configs have 0.9. None leaves the config as it is. The loss has
            it wherever there are labels; an `attention_mask` [batch, len] says which tokens count.
        optimizer_state: for which optimizer `explain` counts memory. It changes nothing else.
            "adamw", and None: two values per parameter, in its dtype, as torch.optim.AdamW.
            "adamw_8bit": two bytes, and a float32 scale for each 256, as bitsandbytes and torchao.
            "adafactor": one value per row and per column, as torch.optim.Adafactor.
            "sgd_momentum", "sgd": one value, or none.

    Raises:
        CompatibilityError: not a GPT-OSS model, already compiled, experts that are packed, weights that transformers
            has quantised or accelerate offloaded, or `router_aux_loss` on a model whose loss has none.
        ValueError: a negative `router_aux_loss`, or an optimizer whose memory is not known.

    Example:
        >>> model = with_full_finetuning(model, router_aux_loss=0.01).train()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        >>> model(input_ids, labels=input_ids).loss.backward()
        >>> optimizer.step()
        >>> print(explain(model).rows[0].changed[0])
        54 parameters take gradients
    """
    return FullFinetuning(
        gradient_checkpointing=gradient_checkpointing,
        router_aux_loss=router_aux_loss,
        optimizer_state=optimizer_state,
    )
