"""How a GPT-OSS model with a language head gets its loss from the head itself, without the logits.

transformers' forward calls the head, hands what it gives to `loss_function`, and returns both. With labels, the head
here gives a `LossAndLogits`: `loss_function` takes the loss out of it, and the rest of the forward stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GptOssForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from ..core import Journal
from ..core.journal import ClassForward
from ..distributed import attributes
from ..kernels.loss import Vocabulary, chunked_cross_entropy
from .linears import without_faster
from .modules import decoder_path, path_of_head
from .training import ARGUMENTS

LOSS = "head and loss"
"""A slot of a model: see `Wrapper`."""

VOCABULARY = "_gptoss_opt_vocabulary"
"""An attribute of a head that computes some of the logits: how the vocabulary is spread over ranks."""

ASKED = "_gptoss_opt_loss"
"""An attribute of decoder and head during a forward with labels: what the head is asked for."""

OF_OTHER_LOSSES = ("label_smoothing", "weight", "reduction", "size_average", "reduce")
"""Arguments of torch's cross entropy that transformers' loss does not hand on."""


class LossAndLogits(NamedTuple):
    """What a head gives that is asked for a loss. The logits are None unless they are asked for too."""

    loss: Tensor
    logits: Tensor | None


@dataclass
class Asked:
    """What a forward with labels asks of the head.

    Attributes:
        labels: int64, one for each row of the head's input, in its order.
        divisor: what the sum over rows is divided by; None for their number.
        ignore_index: the label of rows that do not count.
        logits: whether the logits are wanted too.
        vocabulary: how many logits the head gives, or which part of them on this rank.
        chunk: how many rows are computed at a time, at most; None for what is good.
        ready: whether the decoder is done, so that the next call of the head is the one that is meant.
    """

    labels: Tensor
    divisor: int | float | Tensor | None
    ignore_index: int
    logits: bool
    vocabulary: int | Vocabulary
    chunk: int | None
    ready: bool = False


def why_no_loss(model: nn.Module) -> Iterator[str]:
    """Say why the loss of a model cannot be computed in chunks."""
    if not isinstance(model, GptOssForCausalLM):
        yield f"{type(model).__name__} has no language head, and so no loss over a vocabulary. Leave this out."
    elif model.loss_function is not ForCausalLMLoss:
        yield "model.loss_function is one of your own, which needs the logits. Leave this out, or that."


def set_loss(model: nn.Module, chunk_tokens: int | str, journal: Journal) -> tuple[str, ...]:
    """Let a model compute its loss in chunks; says what was changed, in sentences."""
    journal.around(model, path_of_head(model), loss_of_head, None)
    journal.around(model, decoder_path(model), decoded, None)
    journal.around(model, "", forward_with_loss, chunk_tokens)
    journal.set(model, "", "_loss_function", loss_function)
    chunks = "chunks of tokens" if chunk_tokens == "auto" else f"chunks of at most {chunk_tokens} tokens"
    return (f"loss and gradients of the head: in {chunks}", "logits: in training, only where asked for")


def forward_with_loss(
    chunk_tokens: int | str,
    model: Any,
    inner: Callable[..., Any],
    *args: Any,
    return_logits: bool | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The model's forward, in which the head is asked for the loss if there are labels."""
    given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    head, decoder = model.get_output_embeddings(), model.base_model
    if given.get("labels") is None:
        # A forward within one that has labels, as of a hook, is not asked for their loss.
        with _asking(None, head, decoder):
            return inner(*args, return_dict=return_dict, **kwargs)
    _refuse(model, head, kwargs)
    logits = not model.training if return_logits is None else return_logits
    vocabulary = head.__dict__.get(VOCABULARY, model.config.vocab_size)
    asked = _asked(given, logits, vocabulary, chunk_tokens if isinstance(chunk_tokens, int) else None)
    with _asking(asked, head, decoder):
        out = inner(*args, return_dict=True, **kwargs)
    if not isinstance(out.logits, LossAndLogits):
        raise ValueError(
            f"{type(head).__name__} has taken the place of the head whose loss is computed in chunks. Apply "
            "with_chunked_loss(model) once more."
        )
    out = type(out)(**{**out, "logits": out.logits.logits})
    return out if (model.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


def _asking(asked: Asked | None, head: nn.Module, decoder: nn.Module) -> ExitStack:
    """A context in which `head` is asked for something, or for nothing."""
    context = ExitStack()
    for module in (head, decoder):
        if asked is not None or ASKED in module.__dict__:
            context.enter_context(attributes(module, {ASKED: asked}))
    return context


def _asked(given: dict[str, Any], logits: bool, vocabulary: int | Vocabulary, chunk: int | None) -> Asked:
    """What the arguments of a forward ask of the head, as transformers' `ForCausalLMLoss` reads them."""
    ignored, labels = given.get("ignore_index", -100), given.get("shift_labels")
    if labels is None:  # the tokens before position n predict label n
        labels = nn.functional.pad(given["labels"], (0, 1), value=ignored)[..., 1:]
    return Asked(labels, given.get("num_items_in_batch"), ignored, logits, vocabulary, chunk)


def _refuse(model: Any, head: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` if the loss that is wanted is another one, or the logits are wanted on their way."""
    for name in OF_OTHER_LOSSES:
        value = kwargs.get(name)
        if value is not None and (isinstance(value, Tensor | str) or value):
            raise ValueError(
                f"{name}: with_chunked_loss computes the plain cross entropy, as transformers does, which would ignore "
                "this. Leave labels out of the call, and compute such a loss from the logits."
            )
    if model.__dict__.get("_loss_function") is not loss_function:
        raise ValueError(
            "model.loss_function was set after with_chunked_loss, and needs the logits. undo(model, with_chunked_loss) "
            "first."
        )
    # Those of torch and DeepSpeed gather parameters (FSDP, ZeRO), and look at no values.
    for hook in head._forward_hooks.values():
        if not str(getattr(hook, "__module__", None)).startswith(("torch.", "deepspeed.")):
            raise ValueError(
                f"the head has a forward hook, {hook!r}, and with labels there are no logits for it to see. Remove it, "
                "or undo(model, with_chunked_loss)."
            )


def decoded(_: None, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward; what the model calls next is the head."""
    out, asked = inner(*args, **kwargs), module.__dict__.get(ASKED)
    if asked is not None:
        asked.ready = True
    return out


def loss_of_head(_: None, module: nn.Module, inner: Callable[..., Any], input: Tensor) -> Tensor | LossAndLogits:
    """The head's forward, which gives logits, or what it is asked for."""
    asked: Asked | None = module.__dict__.get(ASKED)
    return inner(input) if asked is None or not asked.ready else loss_and_logits(asked, module, inner, input)


def _loss_and_logits(asked: Asked, module: nn.Module, inner: Callable[..., Tensor], hidden: Tensor) -> LossAndLogits:
    """The loss of a head's input [..., H], and the logits if they are asked for."""
    labels = asked.labels.to(hidden.device).flatten()
    if len(labels) != hidden.shape[:-1].numel():
        raise ValueError(
            f"there are {len(labels)} labels for {hidden.shape[:-1].numel()} rows of logits. Give one for each; with "
            "logits_to_keep, give shift_labels of those alone."
        )
    logits = inner(hidden) if asked.logits else None
    if logits is None or torch.is_grad_enabled():
        head, weights = _as_function(module, inner)
        rows = hidden.flatten(0, -2)
    else:  # they are there, and nothing goes back through the head
        head, weights, rows = _itself, [], logits.flatten(0, -2)
    loss = chunked_cross_entropy(
        head,
        rows,
        labels,
        weights,
        vocabulary=asked.vocabulary,
        chunk=asked.chunk,
        divisor=asked.divisor,
        ignore_index=asked.ignore_index,
    )
    return LossAndLogits(loss, logits)


loss_and_logits: Callable[[Asked, nn.Module, Callable[..., Tensor], Tensor], LossAndLogits] = torch.compiler.disable(
    _loss_and_logits, reason="with_chunked_loss computes gradients in the forward, which torch.compile cannot trace"
)


def _as_function(head: Any, inner: Callable[..., Tensor]) -> tuple[Callable[..., Tensor] | None, list[Tensor]]:
    """A head as a function of rows and weights, None for a plain product, and the weights."""
    if (
        isinstance(without_faster(inner), ClassForward)
        and type(head).forward is nn.Linear.forward
        and head.bias is None
    ):
        return None, [_plain("weight", head.weight)]
    held = _trained(head) if torch.is_grad_enabled() else []

    def logits(rows: Tensor, *weights: Tensor) -> Tensor:
        with ExitStack() as context:
            for (module, name, _), weight in zip(held, weights, strict=True):
                context.enter_context(attributes(module, {name: weight}))
            return inner(rows[None]).flatten(0, -2)

    return logits, [tensor for _, _, tensor in held]


def _itself(logits: Tensor) -> Tensor:
    return logits


def _trained(head: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """What a head computes with and what takes gradients: parameters, or attributes that hide them."""
    return [
        (module, name, tensor)
        for path, module in head.named_modules()
        for name, tensor in {**module._parameters, **module.__dict__}.items()
        if isinstance(tensor, Tensor) and _plain(f"{path}.{name}".lstrip("."), tensor).requires_grad
    ]


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the head, if this rank knows what to compute with. Else raises `ValueError`."""
    if isinstance(tensor, DTensor):
        raise ValueError(
            f"{name} of the head is a DTensor, which something else has made of it. Shard the model with "
            "shard_tensor_parallel(), or with FSDP2 (fully_shard)."
        )
    return tensor


def loss_function(logits: Tensor | LossAndLogits, labels: Any, vocab_size: int, **kwargs: Any) -> Tensor:
    """The model's `loss_function`: the loss that the head gave, or transformers' own of logits."""
    if isinstance(logits, LossAndLogits):
        return logits.loss
    loss: Tensor = ForCausalLMLoss(logits, labels, vocab_size, **kwargs)
    return loss
