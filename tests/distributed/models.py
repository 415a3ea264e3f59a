"""What the ranks of these tests do to models, and what one process has for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptoss_opt import gather_state_dict
from tests.helpers import ids, tiny_model


def whole(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are held as the parameters of `model` are, gathered on the first rank; nothing elsewhere."""
    from gptoss_opt.core import layout_of
    from gptoss_opt.model.save import splits_of

    mesh, splits = layout_of(model).mesh, splits_of(model)
    found = {name: mesh.gather(mesh.local(tensor), splits[name]) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def measured(model: Any, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
    """Logits, loss, gradients by parameter, and greedy tokens."""
    out = model(input_ids, labels=input_ids, **kwargs)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        tokens = model.generate(input_ids[:, :7], max_new_tokens=20, do_sample=False)
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), "gradients": gradients, "tokens": tokens}


def on_rank(wrap: Callable[[Any], Any], **changes: Any) -> dict[str, Any]:
    """`measured` of a wrapped tiny model on this rank, gradients gathered."""
    model = wrap(tiny_model(**changes))
    found = measured(model, ids())
    return {**found, "gradients": whole(found["gradients"], model)}
