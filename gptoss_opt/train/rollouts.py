"""`Rollouts`: the completions that a trainer of TRL learns from, made by a batcher on the very model it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core import mesh_of
from ..core.record import wrapped_model
from ..layout import under_fsdp
from ..model import serving
from ..serve import ContinuousBatcher, Stats
from ..serve.prompts import unpadded


class Rollouts:
    """Completions for the trainers of TRL, by a `ContinuousBatcher` on the very model that is trained.

    There is no second copy of the model, and no weights are moved: what completes a prompt are the parameters as the
    last step of the optimizer left them. The log-probabilities of the sampled tokens are those that the loss finds, so
    far as rounding goes. All completions of a prompt share the pages of the prompt. During a rollout the model is in
    evaluation mode; after it, each module is in the mode it was in, and no gradient has changed.

    - **GRPO** takes it as its `rollout_func`: `GRPOTrainer(model, ..., rollout_func=Rollouts())`.
    - **Trainers that call `model.generate`** (`OnlineDPOTrainer`, `RLOOTrainer`, GRPO with tools) train inside
      `with rollouts.generating(model):`.

    Sampling is what the trainer's arguments say: temperature, top-k, top-p, min-p, repetition penalty, length, ends.
    Draws take their seeds from torch's random numbers, so that `args.seed` makes a run repeatable.

    Args:
        keep_pages: whether the batcher stays between rollouts. If not, its pages are given back before the training
            step begins. If so, they are held while the step runs (`kv_bytes` says how many bytes), but they are
            allocated only once, and CUDA graphs captured only once.
        max_num_sequences: how many completions are generated at once, at most.
        max_batch_tokens: how many tokens one forward computes.
        kv_memory: how many bytes keys and values may take; "auto" takes what the completions can need at most, within
            the bounds of `ContinuousBatcher`.
        page_size: how many tokens share a page.
        cuda_graphs: whether decoding steps on a GPU are captured.

    Attributes:
        stats: the numbers of the last rollout's batcher; None before the first.

    Raises:
        ValueError: when called, where the trainer or its model cannot be served like this, and what to do instead.
        CompatibilityError: when called, where the model cannot be served at all.

    Example:
        >>> rollouts = Rollouts()
        >>> with_flash_attention(model)
        GptOssForCausalLM(...)
        >>> with rollouts.generating(model):
        ...     model.generate(input_ids, max_new_tokens=4, do_sample=False).shape == (1, input_ids.shape[1] + 4)
        True
        >>> rollouts.kv_bytes
        0
    """

    def __init__(
        self,
        *,
        keep_pages: bool = False,
        max_num_sequences: int = 64,
        max_batch_tokens: int = 2048,
        kv_memory: int | str = "auto",
        page_size: int = 16,
        cuda_graphs: bool = True,
    ) -> None:
        self.keep_pages = keep_pages
        self.max_num_sequences, self.max_batch_tokens = max_num_sequences, max_batch_tokens
        self.options: dict[str, Any] = {"kv_memory": kv_memory, "page_size": page_size, "cuda_graphs": cuda_graphs}
        self.stats: Stats | None = None
        self._batcher: ContinuousBatcher | None = None
        self._room = (0, 0)  # how many sequences it takes at once, and of how many tokens

    @property
    def kv_bytes(self) -> int:
        """How many bytes the pages take that are held now."""
        return 0 if self._batcher is None else self._batcher.stats().kv_bytes

    def close(self) -> None:
        """Give back what is held. The next rollout makes it anew."""
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            batcher.close()

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Complete prompts: TRL's `RolloutFunc`.

        Args:
            prompts: texts or conversations, each as often as it is to be completed.
            trainer: the GRPOTrainer.

        Returns:
            For each prompt `prompt_ids`, `completion_ids` (the stop token included) and `logprobs`, the log-probability
            of each new token at the trainer's temperature.
        """
        if reasons := [*_why_not_for(trainer)]:
            raise ValueError("Rollouts: " + " ".join(reasons))
        prompt_ids = _tokenized(prompts, trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        made = self._complete(model, prompt_ids, trainer.generation_config, logprobs_temperature=trainer.temperature)
        tokens, logprobs = zip(*made, strict=True)
        return {"prompt_ids": prompt_ids, "completion_ids": [*tokens], "logprobs": [*logprobs]}

    @contextmanager
    def generating(self, model: nn.Module) -> Iterator[None]:
        """Let `model.generate` be done by the batcher inside the block.

        It then takes `input_ids` [B, T], an `attention_mask` of the same shape, a `generation_config` and its fields,
        and refuses all else. It returns int64 [B, T + N]: the prompts, and behind each its completion, padded on the
        right to the longest. What is held is given back at the end of the block.
        """
        inner: Any = wrapped_model(model)
        before = inner.__dict__.get("generate")

        def generate(inputs: Tensor | None = None, generation_config: Any = None, **options: Any) -> Tensor:
            return self._generate(inner, options.pop("input_ids", inputs), generation_config, **options)

        inner.generate = generate
        try:
            yield
        finally:
            del inner.generate
            if before is not None:
                inner.generate = before
            self.close()

    def _generate(
        self, model: Any, ids: Tensor | None, config: Any, *, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError("Rollouts: generate takes input_ids [B, T] as a tensor.")
        prompts = unpadded({"input_ids": ids, "attention_mask": attention_mask})
        made = [torch.tensor(tokens) for tokens, _ in self._complete(model, prompts, config, **options)]
        found = (options.get("pad_token_id"), *(getattr(one, "pad_token_id", None) for one in (config, model.config)))
        padding = next((one for one in found if one is not None), 0)
        ends = nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=padding).to(ids)
        return torch.cat((ids.repeat_interleave(len(made) // len(ids), dim=0), ends), dim=1)

    def _complete(
        self, model: Any, prompts: Sequence[list[int]], config: Any, **options: Any
    ) -> list[tuple[list[int], list[float]]]:
        """The new tokens of each prompt, and their log-probabilities."""
        model = wrapped_model(model)
        if reasons := [*_why_not_on(model)]:
            raise ValueError("Rollouts: " + " ".join(reasons))
        num_new = options.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
        several = options.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
        longest = max(map(len, prompts)) + num_new if num_new else None
        with _evaluating(model):
            batcher = self._batcher_for(model, len(prompts) * several, longest)
            try:
                made: list[tuple[list[int], list[float]]] = batcher.generate(
                    prompts, config, progress=False, return_logprobs=True, **options
                )
                self.stats = batcher.stats()
            except BaseException:
                self.close()
                raise
            if not self.keep_pages:
                self.close()
        return made

    def _batcher_for(self, model: Any, num_sequences: int, max_length: int | None) -> ContinuousBatcher:
        """The batcher that is kept, if it serves this model and has room; else a new one."""
        num_sequences = min(num_sequences, self.max_num_sequences)
        wanted = num_sequences, max_length or model.config.max_position_embeddings
        kept = self._batcher
        if kept is None or kept.model is not model or any(a > b for a, b in zip(wanted, self._room, strict=True)):
            self.close()
            self._room = wanted
            budget = max(self.max_batch_tokens, num_sequences)
            self._batcher = ContinuousBatcher(
                model,
                max_num_sequences=num_sequences,
                max_batch_tokens=budget,
                max_length=max_length,
                **self.options,
            )
        assert self._batcher is not None
        return self._batcher


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; after it each module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tokenized(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """The ids of texts or conversations, as the trainer itself makes them."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        ids = tokenizer(text=prompts)["input_ids"]
    else:
        template = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
        ids = tokenizer.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )["input_ids"]
    return [list(map(int, one)) for one in ids]


def _why_not_for(trainer: Any) -> Iterator[str]:
    """The reasons why a trainer's prompts cannot be completed like this."""
    if getattr(trainer, "use_vllm", False):
        yield "with use_vllm=True vLLM completes the prompts, on a copy of the weights. Leave it out."
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
        yield (
            "after a tool's answer the trainer goes on by model.generate, past rollout_func. Leave rollout_func out, "
            "and train inside `with rollouts.generating(model):`."
        )
    precision, dtype = trainer.accelerator.mixed_precision, trainer.model.dtype
    if precision in ("bf16", "fp16") and dtype == torch.float32:
        yield (
            f"under {precision}=True a float32 model computes keys in another dtype than its pages have. Load the "
            f"model with dtype=torch.bfloat16, or give the trainer {precision}=False."
        )


def _why_not_on(model: nn.Module) -> Iterator[str]:
    """The reasons why a model that is trained cannot be served meanwhile."""
    if not serving.reads_pages(model):
        yield (
            "attention of this model reads no pages, and is not to be changed between two training steps. Apply "
            "with_flash_attention(model) before it is trained."
        )
    mesh = mesh_of(model)
    if mesh is not None and mesh.mesh.size() > 1:
        yield (
            "several ranks hold this model together, and TRL shuffles completions by random numbers of each rank: they "
            "would compute one forward of different rows. Use DDP, under which each rank holds the model."
        )
    elif under_fsdp(model):
        yield (
            "FSDP holds a part of each parameter on each rank, and ranks that complete prompts of their own would wait "
            "for each other. Use DDP, under which each rank holds the model."
        )
