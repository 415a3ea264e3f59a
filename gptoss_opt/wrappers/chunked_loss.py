"""`with_chunked_loss`: the loss over the vocabulary, and its gradients, without the logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..core import Attachment, Host, Phase, Report, Wrapper, takes_model
from ..model.host import GPT_OSS
from ..model.loss import LOSS, set_loss, why_no_loss


@dataclass(frozen=True, kw_only=True, repr=False)
class ChunkedLoss(Wrapper):
    """What `with_chunked_loss` builds. Options: `chunk_tokens`."""

    chunk_tokens: int | str = "auto"

    name: ClassVar[str] = "with_chunked_loss"
    phase: ClassVar[Phase] = Phase.LOSS
    host: ClassVar[Host] = GPT_OSS
    claims: ClassVar[tuple[str, ...]] = (LOSS,)

    def __post_init__(self) -> None:
        if self.chunk_tokens != "auto" and (type(self.chunk_tokens) is not int or self.chunk_tokens < 1):
            raise ValueError(
                f"{self.name}: chunk_tokens is {self.chunk_tokens!r}. Give a number of tokens, from 1 up, or 'auto'."
            )

    def check(self, model: nn.Module) -> Iterable[str]:
        return why_no_loss(model)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        return Report(set_loss(model, self.chunk_tokens, journal))


@takes_model
def with_chunked_loss(*, chunk_tokens: int | str = "auto") -> ChunkedLoss:
    """The loss over the vocabulary and its gradients, a chunk of tokens at a time: the logits are never there at once.

    The logits of 4,096 tokens over 201,088 words take 3.3 GB in float32, and as much twice more in the backward. Here
    each chunk's gradient goes through the head at once, in the forward; the backward only scales it. Loss and gradients
    are those of transformers, rounding aside: `num_items_in_batch`, `shift_labels`, `ignore_index`, the router's loss.
    Tokens whose label is ignored are not computed. Gradients of the head are summed over chunks in float32, which takes
    6 bytes for each value of a trained head for a moment.

    In training mode the model returns no logits with the loss (`out.logits` is None), in eval mode it does;
    `model(..., labels=labels, return_logits=True)` or `False` decides for one call. Without labels nothing changes. On
    a model whose vocabulary is spread over ranks (`shard_tensor_parallel`) logits are not gathered for the loss.

    Args:
        model: a GptOssForCausalLM, which is changed and returned; a function that returns one; or nothing, for a
            wrapper to give to `compose` or `load`.
        chunk_tokens: how many tokens' logits are there at a time, at most. "auto" takes as many as have 256 MiB,
            but at least 16; more where the head is trained, as the sum of its gradient takes as much anyway.

    Raises:
        CompatibilityError: not a GptOssForCausalLM, already compiled, or a `loss_function` of your own.
        ValueError: `chunk_tokens` is no number of tokens; in a call, `label_smoothing` or another argument of a loss
            that is not the plain one.

    Example:
        >>> model = with_chunked_loss(model).train()
        >>> out = model(input_ids, labels=input_ids)
        >>> out.loss.backward()
        >>> print(out.logits)
        None
    """
    return ChunkedLoss(chunk_tokens=chunk_tokens)
