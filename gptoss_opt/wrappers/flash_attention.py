"""`with_flash_attention`: exact attention with sinks in linear memory, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..core import Attachment, Choice, Host, Phase, Report, Wrapper, check_name, choose, takes_model
from ..kernels.attention import BACKENDS
from ..model.attention import ATTENTION, attention_request, set_attention, why_no_flash
from ..model.host import GPT_OSS


@dataclass(frozen=True, kw_only=True, repr=False)
class FlashAttention(Wrapper):
    """What `with_flash_attention` builds. Options: `backend`."""

    backend: str = "auto"

    name: ClassVar[str] = "with_flash_attention"
    phase: ClassVar[Phase] = Phase.COMPUTE
    host: ClassVar[Host] = GPT_OSS
    claims: ClassVar[tuple[str, ...]] = (ATTENTION,)

    def __post_init__(self) -> None:
        check_name(BACKENDS, self.backend, self.name)

    def check(self, model: nn.Module) -> Iterable[str]:
        return why_no_flash(model)

    def choice(self, model: nn.Module) -> Choice:
        return choose(BACKENDS, attention_request(model), self.backend, self.name)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        assert journal.choice is not None
        return Report(set_attention(model, journal.choice.backend, journal))


@takes_model
def with_flash_attention(*, backend: str = "auto") -> FlashAttention:
    """Exact flash attention with sinks, forward and backward, on CPU and GPU. Memory grows linearly with length.

    Replaces eager attention in every layer, sliding and full. Keeps the weights, the checkpoint and `generate` as they
    are; gradients reach q, k, v and the sinks. Serves padding anywhere, packed sequences (`position_ids` that restart,
    an `attention_mask` that numbers them, or `cu_seq_lens_q`), DynamicCache and StaticCache, chunked prefill, your own
    4-D mask, gradient checkpointing and `torch.compile`. Refuses `output_attentions=True` and dropout.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a
            wrapper to give to `compose`.
        backend: "auto", or one by name, which then never falls back:
            "fa4", "fa3", "fa2": the flash-attn package, CUDA, bfloat16 and float16.
            "native": a library in C, CPU, for one query per row (decoding) in bfloat16 and float32, and for
                several in bfloat16 on AVX-512 BF16; the rest, and gradients, as "torch".
            "torch": torch's own flash kernels, CPU (also float32, float64) and CUDA.
            "reference": plain matrix products, quadratic memory; defines the semantics, never chosen by "auto".

    Raises:
        CompatibilityError: not a GPT-OSS model, already compiled, dropout, or a backend that cannot serve here.
        BackendError: no backend has that name.

    Example:
        >>> model = with_flash_attention(model)
        >>> model.generate(input_ids, max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 11])
    """
    return FlashAttention(backend=backend)
