"""A model behind a `ContinuousBatcher`, as the lm-evaluation-harness asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from ..serve import ContinuousBatcher, Request
from .asks import Ask, completed

Tokens = tuple[Any, list[int], list[int]]
"""What is written into the harness's cache, the ids of the context, and those of the continuation."""


class BatcherLM(TemplateLM):  # type: ignore[misc]
    """A model for `lm_eval.simple_evaluate`, whose requests share forwards, and what their prompts have in common.

    All numbers are those of the harness's own `HFLM` on the same model. A context that several continuations or several
    questions begin with, as few-shot examples are, is computed once.

    Args:
        model: a GptOssForCausalLM, with the wrappers it has.
        tokenizer: its tokenizer, which has an end token.
        max_length: how many tokens the model may see; `max_position_embeddings` if left out.
        max_gen_toks: how many tokens are generated at most where a task does not say.
        prefix_token_id: the token before a text that has no context; the tokenizer's first token, or its end token, if
            left out.
        think_end_token: the id of the token that ends thoughts: what is generated up to the last one is left out of the
            answer.
        chat_template_args: what the chat template takes beside the messages, such as `{"reasoning_effort": "low"}`.
        options: those of `ContinuousBatcher`.

    Attributes:
        batcher: the `ContinuousBatcher`.

    Raises:
        ValueError: the tokenizer has no end token, or an option makes no sense.
        CompatibilityError: the model cannot be served, and why.

    Example::

        lm = BatcherLM(model, tokenizer=tokenizer)
        results = lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"], num_fewshot=25)
        lm.close()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        think_end_token: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token: set its eos_token.")
        self.tokenizer, self.max_gen_toks = tokenizer, max_gen_toks
        self.batcher = ContinuousBatcher(model, **options)
        config: Any = model.config
        self.max_length = config.max_position_embeddings if max_length is None else max_length
        self._prefix_token_id = prefix_token_id
        self._think_end_token = think_end_token
        self._chat_template_args = dict(chat_template_args or {})

    def close(self) -> None:
        """Leave the model as it was."""
        self.batcher.close()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        given = (self._prefix_token_id, self.tokenizer.bos_token_id, self.eot_token_id)
        return next(one for one in given if one is not None)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for the names of the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; without `add_generation_prompt` its last message goes on."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_template_args,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; where nothing is said, with the special tokens that it does not begin with already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        said = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **said))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length` tokens that do not overlap."""
        windows: list[Tokens] = []
        counts: list[int] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            found = [*get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)]
            windows += [(None, *make_disjoint_window(one)) for one in found]
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Tokens], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asks = []
        for _, context, continuation in requests:
            count = len(continuation)
            if count > self.max_length:
                raise ValueError(
                    f"a continuation has {count} tokens, more than max_length={self.max_length}. Raise max_length, or "
                    "leave its task out."
                )
            # The last token is scored and not computed: there is room for one more.
            prompt = [*context, *continuation][-self.max_length - 1 :]
            asks.append(Ask(prompt, {"prompt_logprobs": count, "logprobs": 1, "max_new_tokens": 0}))
        answers: dict[int, tuple[float, bool]] = {}
        for number, request in self._completed(asks, "loglikelihood", disable_tqdm):
            answers[number] = _likelihood(request)
            if (said := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", said, answers[number])
        return [answers[number] for number in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, up to the first of its stop strings."""
        asks = [self._ask_of(*request.args) for request in requests]
        texts: dict[int, str] = {}
        for number, request in self._completed(asks, "generate_until", disable_tqdm):
            texts[number] = self._text(request.tokens, asks[number].until)
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _ask_of(self, context: str, gen_kwargs: dict[str, Any]) -> Ask:
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        if "max_length" in options:
            raise ValueError("a task sets max_length, which counts the prompt, too: let it set max_gen_toks.")
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode(self.eot_token_id))
        count = options.pop("max_gen_toks")
        if count >= self.max_length:
            raise ValueError(f"max_gen_toks is {count}, and must be less than max_length={self.max_length}.")
        prompt = self.tok_encode(context)[count - self.max_length :]
        options |= {"max_new_tokens": count, "stop_token_ids": [self.eot_token_id]}
        return Ask(prompt, options, [one for one in until if one])

    def _text(self, tokens: list[int], until: Sequence[str]) -> str:
        end = self._think_end_token
        answer = tokens[len(tokens) - tokens[::-1].index(end) :] if end in tokens else tokens
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return str(postprocess_generated_text(text if end is None else text.lstrip(), list(until), None))

    def _completed(self, asks: Sequence[Ask], name: str, disable: bool) -> Any:
        found = completed(self.batcher, asks, self.tokenizer.decode)
        return tqdm(found, desc=f"{name} requests", total=len(asks), disable=disable)


def _likelihood(request: Request) -> tuple[float, bool]:
    """The log-likelihood of what was scored, and whether each of its tokens is the likeliest in its place."""
    found = request.prompt_logprobs
    return sum(one.logprob for one in found), all(one.likeliest[0][0] == one.token for one in found)
