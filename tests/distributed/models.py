"""What the ranks of these tests do to models, and what one process has for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptoss_opt.checkpoint.save import splits_of
from gptoss_opt.core import mesh_of
from tests.helpers import ids, tiny_model

UNEVEN = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "num_local_experts": 6,
    "vocab_size": 131,
}
"""Five blocks of the intermediate dimension, six experts and 131 tokens divide by neither 2 nor 4 (but six by 2)."""


def whole(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are held as the parameters of `model` are, gathered on the first rank; nothing elsewhere."""
    mesh = mesh_of(model)
    splits = splits_of(model)
    found = {name: mesh.gather(mesh.local(tensor), splits[name]) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def measured(model: Any, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
    """Logits, loss, gradients by parameter, and greedy tokens."""
    out = model(input_ids, labels=input_ids, **kwargs)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        tokens = model.generate(input_ids[:, :7], max_new_tokens=12, do_sample=False)
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), "gradients": gradients, "tokens": tokens}


def expected(**changes: Any) -> dict[str, Any]:
    """`measured` of the tiny model in one process."""
    return measured(tiny_model(**{**UNEVEN, **changes}), ids())


def on_rank(wrap: Callable[[Any], Any], **changes: Any) -> dict[str, Any]:
    """`measured` of the wrapped tiny model on this rank, gradients gathered on the first."""
    model = wrap(tiny_model(**{**UNEVEN, **changes}))
    found = measured(model, ids())
    return {**found, "gradients": whole(found["gradients"], model)}
