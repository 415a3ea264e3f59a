"""What is verified: a model with its tokens, once nothing stands in the way."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.record import wrapped_model
from ..model.host import GPT_OSS
from .probe import STEPS
from .ranks import VerifyingRanks

PADDING = 5
"""How many tokens of the second row are padding."""
MAX_TOKENS = 512
MAX_DEFAULT = 448
"""The most tokens of a row, and of a row that is made here."""


@dataclass(frozen=True)
class Subject:
    """What is verified.

    Attributes:
        model: the GPT-OSS model with a language head.
        tokens: int64 [B, T].
        seen: bool [B, T]; False is padding.
        gradients: whether gradients are compared too.
    """

    model: Any
    tokens: Tensor
    seen: Tensor
    gradients: bool

    @property
    def layers(self) -> list[Any]:
        """The decoder layers."""
        return list(self.model.model.layers)

    @property
    def size(self) -> str:
        """How many tokens there are, in words."""
        rows, length = self.tokens.shape
        return f"{rows} rows of {length} tokens"

    @property
    def statement(self) -> dict[str, str]:
        """What must be the same on all ranks, by name."""
        return {
            "what is done": "verify",
            "the layers": str(len(self.layers)),
            "the dtype": str(self.model.dtype),
            "gradients": str(self.gradients),
        }

    @property
    def fingerprint(self) -> str:
        """The tokens as ranks compare them."""
        values = self.tokens.cpu()
        return f"{self.size} that begin with {values[0, :4].tolist()}, checksum {zlib.crc32(values.numpy().tobytes())}"


def subject(model: Any, against: str, tokens: Tensor | None, gradients: bool, ranks: VerifyingRanks) -> Subject:
    """What is verified where a user asked for this. Raises `ValueError` if that cannot be."""
    if against != "eager":
        raise ValueError(f"against is {against!r}. Use 'eager'.")
    inner = _with_head(model)
    _refuse_foreign(inner, ranks)
    tokens, seen = _random_tokens(inner, ranks.dp_rank) if tokens is None else _given_tokens(inner, tokens)
    return Subject(inner, tokens.to(inner.device, torch.int64), seen.to(inner.device), bool(gradients))


def _with_head(model: Any) -> Any:
    """The GPT-OSS model with a language head, inside whatever is around it. Raises `ValueError` if there is none."""
    inside: Iterator[Any] = wrapped_model(model).modules()
    found = next((one for one in inside if GPT_OSS.why_not(one) is None and hasattr(one, "lm_head")), None)
    if found is None:
        raise ValueError(f"verify takes a GptOssForCausalLM, and this {type(model).__name__} has none inside.")
    if any(hasattr(layer.mlp.experts, "base_layer") for layer in found.model.layers):
        raise ValueError(
            "the experts are adapted by peft (target_parameters), and verify does not know those adapters. Merge them "
            "first (merge_and_unload()), or load them as with_lora's: load_adapter."
        )
    return found


def _refuse_foreign(model: nn.Module, ranks: VerifyingRanks) -> None:
    """Raise `ValueError` if something else than our wrappers has spread a model over ranks."""
    # FSDP2 holds parameters that between a forward and a backward look like any.
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    under_fsdp = not kinds.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})
    for name, parameter in model.named_parameters():
        if under_fsdp or (isinstance(parameter, DTensor) and not ranks.hold(parameter)):
            holder = "FSDP" if under_fsdp else "something else than wrappers of gptoss_opt"
            raise ValueError(
                f"{name} is held by {holder}, and verify, which computes parts of a model by themselves, cannot bring "
                "it together. Verify the model before that (before fully_shard)."
            )


def _random_tokens(model: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, and which of them are no padding."""
    config = model.config
    window = config.sliding_window or MAX_DEFAULT
    length = min(window + window // 2 + 8, config.max_position_embeddings, MAX_DEFAULT)
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator, device="cpu")
    seen = torch.ones(tokens.shape, dtype=torch.bool, device="cpu")
    seen[1, :PADDING] = False
    return tokens, seen


def _given_tokens(model: Any, tokens: Any) -> tuple[Tensor, Tensor]:
    """The user's tokens, none of which is padding. Raises `ValueError` if they are none."""
    num_words = model.config.vocab_size
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2:
        kind = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens are {kind}. Give a tensor of int64, [batch, length].")
    if not len(tokens) or tokens.shape[1] < STEPS + 2:
        raise ValueError(f"tokens are {list(tokens.shape)}. Give a row at least, of {STEPS + 2} at least.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < num_words:
        raise ValueError(f"tokens are from {int(tokens.min())} to {int(tokens.max())}, of {num_words} words.")
    if tokens.shape[1] > MAX_TOKENS and tokens.numel() > 4 * MAX_TOKENS:
        raise ValueError(f"tokens are {list(tokens.shape)}, and all scores of attention are written. Give fewer.")
    return tokens, torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
