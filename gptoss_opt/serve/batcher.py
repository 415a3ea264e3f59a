"""`ContinuousBatcher`: many requests on one model at once, each coming and going as it likes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..core import CompatibilityError
from ..model import serving
from . import served
from .build import build_engine
from .prompts import Prompt, RequestBuilder, unpadded
from .request import GenerationError, Request
from .stats import Stats
from .stepper import Stepper


class ContinuousBatcher:
    """Serves a model: requests share each forward, and their keys and values lie in pages.

    Prompts are computed in chunks beside the sequences that decode, nothing is padded, and a prompt that begins as
    another did uses its pages. Sliding layers keep only their last window. The model stays the one you have, with the
    wrappers it has; where attention does not read pages yet, `with_flash_attention` goes on until `close`.

    On a model that several ranks hold together, every rank makes a batcher and calls `generate`, or enters it: the
    first schedules, the others follow.

    Args:
        model: a GptOssForCausalLM.
        max_num_sequences: how many are generated at once; others wait in the order they came.
        max_batch_tokens: how many tokens one forward computes.
        max_length: how many tokens a prompt and its completion may have together; None for what the model allows.
        kv_memory: how many bytes keys and values may take on this rank, or "auto": on a GPU nine tenths of what a full
            step leaves free; on a CPU what is needed at most, up to half of what is free.
        page_size: how many tokens share a page.
        share_prefixes: whether prompts that begin alike use the same pages.
        cuda_graphs: whether steps on a GPU in which all sequences decode are captured once and replayed; `stats` says
            whether they are, or why not.

    Raises:
        CompatibilityError: the model cannot be served, and why.
        ValueError: an option makes no sense.

    Example:
        >>> batcher = ContinuousBatcher(model, max_num_sequences=4)
        >>> [len(tokens) for tokens in batcher.generate([[1, 2, 3], [4, 5]], max_new_tokens=5, progress=False)]
        [5, 5]
        >>> with batcher:
        ...     request = batcher.submit([1, 2, 3], max_new_tokens=4, temperature=0.7, seed=1)
        ...     len(list(request))
        4
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_num_sequences: int = 64,
        max_batch_tokens: int = 2048,
        max_length: int | None = None,
        kv_memory: int | str = "auto",
        page_size: int = 16,
        share_prefixes: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        _check(max_num_sequences, max_batch_tokens, max_length, kv_memory, page_size)
        if problems := [f"ContinuousBatcher: {reason}" for reason in serving.why_not_served(model)]:
            raise CompatibilityError(problems)
        self.model, user = model, object()
        served.acquire(model, user)
        try:
            engine = build_engine(
                model,
                max_num_sequences=max_num_sequences,
                max_batch_tokens=max_batch_tokens,
                max_length=max_length,
                kv_memory=kv_memory,
                page_size=page_size,
                share_prefixes=share_prefixes,
                cuda_graphs=cuda_graphs,
            )
        except BaseException:
            served.release(model, user)
            raise
        self._stepper = Stepper(engine)
        # Also when it is dropped without being closed.
        self._give_back = weakref.finalize(self, _give_back, self._stepper, model, user)
        self._give_back.atexit = False
        max_tokens = engine.runner.memory.max_tokens
        self._builder = RequestBuilder(model, max_tokens, engine.scheduler.why_never)

    def generate(
        self,
        prompts: Sequence[Prompt] | Mapping[str, Any],
        generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        tokenizer: Any = None,
        progress: bool = True,
        return_exceptions: bool = False,
        return_logprobs: bool = False,
        **options: Any,
    ) -> list[Any]:
        """Complete all prompts, and return when all are done.

        Args:
            prompts: lists of token ids, or what a tokenizer returns (`input_ids`, and `attention_mask` if they are
                padded); or texts, with a tokenizer.
            generation_config: one for all prompts, or one for each. `model.generation_config` says what it leaves open.
            tokenizer: makes ids of texts, and texts of what is generated.
            progress: whether to show a bar.
            return_exceptions: put the error of a prompt in its place, instead of raising it.
            return_logprobs: return for each prompt what it would otherwise, and a list with the log-probability of each
                new token, by the model, before temperature and the like.
            options: as in `submit`.

        Returns:
            The new token ids of each prompt, the stop token included (texts without special tokens, with a tokenizer);
            `num_return_sequences` for each prompt, one after the other. On all ranks the same.

        Raises:
            ValueError: a prompt or an option is wrong; then nothing was computed.
            GenerationError: one could not be completed; the others were, and are in its `results`.
        """
        stepper = self._stepper
        if not stepper.leads:
            if stepper.thread is not None:
                raise RuntimeError(FOLLOWS)
            return stepper.follow()
        with stepper.lead() as results:
            if isinstance(prompts, Mapping) and "input_ids" in prompts:
                prompts = unpadded(prompts)
            if isinstance(prompts, str) or not hasattr(prompts, "__len__") or hasattr(prompts, "keys"):
                what = type(prompts).__name__
                raise ValueError(f"prompts are a list of lists of token ids, or of texts, not a {what}.")
            config = generation_config
            configs = config if isinstance(config, list | tuple) else [config] * len(prompts)
            if len(configs) != len(prompts):
                given = f"{len(configs)} configs for {len(prompts)} prompts"
                raise ValueError(f"{given}: give one for all, or one for each.")
            if return_logprobs:
                options["logprobs"] = options.get("logprobs") or 0
            # What can be read once only is read for all prompts.
            options = {name: tuple(value) if isinstance(value, Iterator) else value for name, value in options.items()}
            made: list[Request | ValueError] = []
            for number, (prompt, one) in enumerate(zip(prompts, configs, strict=True)):
                made += self._requests_or_errors(number, prompt, one, tokenizer, options)
                if isinstance(made[-1], ValueError) and not return_exceptions:
                    raise made[-1]
            self._complete([one for one in made if isinstance(one, Request)], progress)
            results += [_result_of(one, tokenizer, return_logprobs) for one in made]
            failed = [result for result in results if isinstance(result, GenerationError)]
            if failed and not return_exceptions:
                error = GenerationError(f"{len(failed)} of {len(results)} could not be completed: {failed[0]}")
                error.results = results
                raise error from failed[0]
        return results

    def submit(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Any = None,
        seed: int | None = None,
        stop_token_ids: Iterable[int] = (),
        logprobs: int | None = None,
        logprobs_temperature: float = 1.0,
        prompt_logprobs: int | None = None,
        **options: Any,
    ) -> Request:
        """Let a prompt be completed, and return at once. From any thread.

        Inside `with batcher:` a thread makes the steps. Outside, whoever waits for a request makes them.

        Args:
            prompt: token ids; or a text, with a tokenizer.
            generation_config: `model.generation_config` says what it leaves open.
            tokenizer: makes ids of a text, and is needed for stop strings.
            seed: the seed of the draws. The same seed gives the same tokens, whatever is computed beside them; without
                one it is drawn from torch's random numbers.
            stop_token_ids: ids that end the completion, beside `eos_token_id`.
            logprobs: for how many of the likeliest tokens to give log-probabilities, beside the chosen one's.
            logprobs_temperature: what logits are divided by for them, as losses of reinforcement learning do.
            prompt_logprobs: of how many of the prompt's last tokens to give log-probabilities, too, by the model
                itself. With it, `max_new_tokens` may be 0: the prompt is scored, and nothing is generated.
            options: fields of `GenerationConfig`, heard before `generation_config`: `max_new_tokens`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `min_new_tokens`, `eos_token_id`,
                `stop_strings`, `num_return_sequences`. A temperature, top-k, top-p or min-p turns sampling on; an
                `eos_token_id` of -1 lets nothing end it but its length.

        Returns:
            The request; with `num_return_sequences` the first of `request.completions`.

        Raises:
            ValueError: the prompt is empty, too long for the model or for the pages, or holds ids that the model does
                not have; or an option is not implemented, or has no such value.
            GenerationError: the batcher is closed.
        """
        stepper = self._stepper
        stepper.check_open()
        if not stepper.leads:
            raise RuntimeError(FOLLOWS)
        if stepper.engine.mesh is not None and stepper.thread is None:
            raise RuntimeError(
                "several ranks hold the model: submit inside `with batcher:`, which each of them enters."
            )
        options |= {"seed": seed, "stop_token_ids": stop_token_ids}
        options |= {"logprobs": logprobs, "logprobs_temperature": logprobs_temperature}
        options |= {"prompt_logprobs": prompt_logprobs}
        # A request that goes on keeps the batcher.
        requests = self._builder.build(prompt, generation_config, tokenizer, options, self.step)
        stepper.send(requests)
        return requests[0]

    def step(self) -> bool:
        """Make one step in this thread; False if there was nothing to do, or a thread of the batcher makes them."""
        return self._stepper.step()

    def clear_prefixes(self) -> None:
        """Let no prompt use what was computed until now.

        Changed weights and adapters are noticed without it, but for what is written through `parameter.data`.
        """
        self._stepper.forget()

    def stats(self) -> Stats:
        """The numbers of the work so far. They print as a table."""
        return self._stepper.engine.stats()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: it was closed, or a step failed."""
        return self._stepper.closed is not None

    def close(self) -> None:
        """End what goes on, with an error, and leave the model as it was. A second call does nothing."""
        self._close(wait=False)

    def __enter__(self) -> ContinuousBatcher:
        self._stepper.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for what was submitted, then close; after an exception close at once."""
        self._close(wait=error is None)

    def __repr__(self) -> str:
        state = "closed" if self._stepper.closed else f"{len(self._stepper.engine.requests)} requests"
        return f"<ContinuousBatcher on {type(self.model).__name__}: {state}>"

    def _close(self, *, wait: bool) -> None:
        try:
            self._stepper.close(GenerationError("the batcher was closed"), wait=wait)
        finally:
            self._give_back()

    def _requests_or_errors(
        self, number: int, prompt: Prompt, config: GenerationConfig | None, tokenizer: Any, options: dict[str, Any]
    ) -> list[Request] | list[ValueError]:
        """The requests of a prompt; if it is refused, as many times the error that says why."""
        try:
            return self._builder.build(prompt, config, tokenizer, options, self.step)
        except ValueError as error:
            configs = (config, self.model.generation_config)
            asked = [options.get("num_return_sequences"), *(getattr(c, "num_return_sequences", None) for c in configs)]
            several = next((one for one in asked if one is not None), 1)
            return [ValueError(f"prompt {number}: {error}")] * (max(1, several) if isinstance(several, int) else 1)

    def _complete(self, requests: Sequence[Request], progress: bool) -> None:
        going, counts = list(requests), self._stepper.engine.counts
        try:
            self._stepper.send(requests)
            with tqdm(total=len(requests), unit="request", disable=not progress) as bar:
                while going:
                    if not self.step():
                        going[0].wait(0.1)
                    left = [request for request in going if not request.done]
                    bar.set_postfix_str(f"{counts.per_second(counts.tokens_out):.0f} tokens/s", refresh=False)
                    bar.update(len(going) - len(left))
                    going = left
        finally:
            for request in requests:
                request.cancel()


def _give_back(stepper: Stepper, model: nn.Module, user: object) -> None:
    try:
        stepper.close(GenerationError("the batcher was dropped without being closed"), wait=False)
    finally:
        served.release(model, user)


FOLLOWS = "this rank follows the first, which schedules: submit there."


def _check(max_num_sequences: Any, max_batch_tokens: Any, max_length: Any, kv_memory: Any, page_size: Any) -> None:
    for name, value, extra in (
        ("max_num_sequences", max_num_sequences, ""),
        ("max_batch_tokens", max_batch_tokens, ""),
        ("max_length", 1 if max_length is None else max_length, ", or None"),
        ("page_size", page_size, ""),
        ("kv_memory", 1 if kv_memory == "auto" else kv_memory, ' of bytes, or "auto"'),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, and must be a number of at least 1{extra}.")
    if max_batch_tokens < max_num_sequences:
        raise ValueError(
            f"max_batch_tokens is {max_batch_tokens}, less than max_num_sequences, {max_num_sequences}: each sequence "
            "gets one token in each step. Raise the first, or lower the second."
        )


def _result_of(request: Request | ValueError, tokenizer: Any, with_logprobs: bool) -> Any:
    if isinstance(request, ValueError):
        return request
    try:
        tokens = request.result()
        made = tokens if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
        return (made, [one.logprob for one in request.logprobs]) if with_logprobs else made
    except GenerationError as error:
        return error
    except Exception as error:
        failed = GenerationError(f"the tokenizer failed on the new tokens: {error!r}", list(request.tokens))
        failed.__cause__ = error
        return failed
