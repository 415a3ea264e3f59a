"""How a completion is made: transformers' `GenerationConfig`, read field by field."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig

SAMPLING: Mapping[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""Fields that shape the distribution, with the values that `generate` takes where nothing is said."""

Layers = tuple[Mapping[str, Any], ...]
"""What the fields of a call say, what its config says, and what the model says: the first to say something is heard."""

SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max

READ = (
    # Fields that are implemented.
    *SAMPLING,
    "do_sample",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "eos_token_id",
    "stop_strings",
    "num_return_sequences",
)

WITHOUT_EFFECT = (
    # Fields for padding and bookkeeping, which packed batches do not have; and for the cache, which is this package's.
    "pad_token_id",
    "bos_token_id",
    "transformers_version",
    "use_cache",
    "cache_implementation",
    "prefill_chunk_size",
    "disable_compile",
    "return_dict_in_generate",
)

NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_assistant_tokens_schedule": "constant",
    "num_assistant_tokens": 20,
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Fields that are not implemented, with the value under which each does nothing. So does any that is None, False or
empty."""

RANGES: Mapping[str, tuple[Any, float, float, str]] = {
    "max_new_tokens": (Integral, 0, math.inf, "a whole number of at least 1"),
    "max_length": (Integral, 1, math.inf, "a whole number of at least 1"),
    "min_new_tokens": (Integral, 0, math.inf, "a whole number of at least 0"),
    "num_return_sequences": (Integral, 1, math.inf, "a whole number of at least 1"),
    "logprobs": (Integral, 0, math.inf, "a whole number of at least 0"),
    "logprobs_temperature": (Real, SMALLEST, LARGEST, "a number above 0"),
    "prompt_logprobs": (Integral, 0, math.inf, "a whole number of at least 0"),
    "seed": (Integral, -math.inf, math.inf, "a whole number"),
    "temperature": (Real, 0, LARGEST, "a number of at least 0 (0 is greedy)"),
    "top_k": (Integral, 0, math.inf, "a whole number of at least 0 (0 is off)"),
    "top_p": (Real, SMALLEST, 1, "a number above 0, up to 1"),
    "min_p": (Real, 0, 1, "a number from 0 to 1"),
    "repetition_penalty": (Real, SMALLEST, LARGEST, "a number above 0"),
}
"""The fields that are numbers: the kind, minimum and maximum of each, and the same in words."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits. Equal by value: sequences with the same are sampled together.

    Attributes:
        temperature, top_k, top_p, min_p: as in transformers; a temperature of None is greedy: the likeliest is taken.
        repetition_penalty: as in transformers.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Options:
    """What is asked for one prompt.

    Attributes:
        max_new_tokens: how many tokens are generated at most.
        min_new_tokens: how many tokens are generated before a stop token may be.
        stop_token_ids: ids that end a completion, and are its last token.
        stop_strings: strings that end a completion once its text holds one.
        sampling: how tokens are drawn.
        seed: the seed of the draws.
        logprobs: for how many of the likeliest tokens log-probabilities are wanted, beside the chosen one's; None for
            no log-probabilities at all.
        logprobs_temperature: what logits are divided by for the log-probabilities of new tokens.
        prompt_logprobs: of how many of the prompt's last tokens log-probabilities are wanted, too.
        num_return_sequences: how many completions are made.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    seed: int = 0
    logprobs: int | None = None
    logprobs_temperature: float = 1.0
    prompt_logprobs: int = 0
    num_return_sequences: int = 1

    @classmethod
    def of(
        cls,
        prompt_length: int,
        of_model: GenerationConfig,
        config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        stop_token_ids: Iterable[int] = (),
        logprobs: int | None = None,
        logprobs_temperature: float = 1.0,
        prompt_logprobs: int | None = None,
        **fields: Any,
    ) -> Options:
        """The options for a prompt of `prompt_length` tokens: `fields` go before `config`, and that before `of_model`.

        Raises:
            ValueError: a field has no such value, or is not implemented; the message names it.
        """
        if unknown := sorted(set(fields) - set(vars(of_model))):
            raise ValueError(f"GenerationConfig has no field {', '.join(map(repr, unknown))}.")
        fields = {name: value for name, value in fields.items() if value is not None}
        layers = (fields, _said(config), _said(of_model))
        said = {**layers[2], **layers[1], **layers[0]}
        asked = {"seed": seed, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        _check({**said, **asked, "logprobs_temperature": logprobs_temperature})
        options = cls(
            max_new_tokens=_max_new_tokens(prompt_length, layers),
            min_new_tokens=int(said.get("min_new_tokens") or 0),
            stop_token_ids=_ids("eos_token_id", said.get("eos_token_id")) | _ids("stop_token_ids", stop_token_ids),
            stop_strings=_strings(said.get("stop_strings")),
            sampling=_sampling(layers, said),
            seed=int(torch.randint(2**62, ())) if seed is None else int(seed),
            logprobs=None if logprobs is None else int(logprobs),
            logprobs_temperature=float(logprobs_temperature),
            prompt_logprobs=int(prompt_logprobs or 0),
            num_return_sequences=int(said.get("num_return_sequences") or 1),
        )
        if not options.max_new_tokens and not options.prompt_logprobs:
            raise ValueError(
                "max_new_tokens is 0, and must be a whole number of at least 1; or ask for prompt_logprobs."
            )
        if options.prompt_logprobs >= prompt_length:
            raise ValueError(
                f"prompt_logprobs is {options.prompt_logprobs}, and the prompt has {prompt_length} tokens. The "
                f"first has none before it: ask for {prompt_length - 1} at most."
            )
        if options.min_new_tokens > options.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {options.min_new_tokens}, more than max_new_tokens, {options.max_new_tokens}. "
                "Lower it."
            )
        if options.num_return_sequences > 1 and options.sampling.temperature is None:
            raise ValueError(
                f"num_return_sequences is {options.num_return_sequences}, and greedy completions of one prompt are all "
                "the same. Sample them: do_sample=True."
            )
        return options


def _check(said: Mapping[str, Any]) -> None:
    if refused := [name for name in said if name not in RANGES and not _implemented(name, said[name])]:
        values = ", ".join(f"{name}={said[name]!r}" for name in refused)
        raise ValueError(f"ContinuousBatcher does not implement {values}. Leave it out, or use model.generate.")
    for name, (kind, minimum, maximum, words) in RANGES.items():
        value = said.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or not minimum <= _as_number(value) <= maximum:
            raise ValueError(f"{name} is {value!r}, and must be {words}.")
    if not isinstance(said.get("do_sample", False), bool):
        raise ValueError(f"do_sample is {said['do_sample']!r}, and must be True or False.")


def _as_number(value: Any) -> float | int:
    try:
        return int(value) if isinstance(value, Integral) and abs(int(value)) < 2**63 else float(value)
    except OverflowError:
        return math.inf


def _said(config: GenerationConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config is a GenerationConfig, not a {type(config).__name__}.")
    return {name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")}


def _implemented(name: str, value: Any) -> bool:
    nothing = value is False or (hasattr(value, "__len__") and not len(value))
    return name in READ or name in WITHOUT_EFFECT or nothing or NEUTRAL.get(name) == value


def is_id(value: object) -> bool:
    """Whether a value may be a token id: a whole number of any type, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _ids(name: str, value: Any) -> frozenset[int]:
    """The ids that a field holds: one, or several, as a number, list or tensor. Raises `ValueError`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    several = [] if value is None else list(value) if listed else [value]
    if not all(map(is_id, several)):
        raise ValueError(f"{name} is {value!r}, and must be a token id, or several.")
    return frozenset(map(int, several))


def _max_new_tokens(prompt_length: int, layers: Layers) -> int:
    """How many new tokens are asked for: 20 where nothing is said, as in `generate`."""
    for fields in layers:
        if fields.get("max_new_tokens") is not None:
            return int(fields["max_new_tokens"])
        if fields.get("max_length") is not None:
            if fields["max_length"] <= prompt_length:
                raise ValueError(
                    f"max_length is {fields['max_length']}, and the prompt has {prompt_length} tokens already. "
                    "Use max_new_tokens."
                )
            return int(fields["max_length"]) - prompt_length
    return 20


def _strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    if value is not None and not isinstance(value, Iterable):
        raise ValueError(f"stop_strings are texts, not {value!r}.")
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(one, str) and one for one in strings):
        raise ValueError(f"stop_strings are texts of at least one character, not {strings!r}.")
    return strings


def _samples(layers: Layers) -> bool:
    """Whether tokens are drawn. Where do_sample is not said, a temperature and the like are meant to be used."""
    *given, of_model = layers
    for fields in given:
        if "do_sample" in fields:
            return bool(fields["do_sample"])
        if any(name in fields for name in SAMPLING):
            return True
    return bool(of_model.get("do_sample", False))


def _sampling(layers: Layers, said: Mapping[str, Any]) -> Sampling:
    penalty = float(said.get("repetition_penalty", 1.0))
    shaped = None if penalty == 1.0 else penalty
    shape = {**SAMPLING, **said}
    temperature, top_p, min_p = (float(shape[name]) for name in ("temperature", "top_p", "min_p"))
    if not _samples(layers) or not temperature:
        return Sampling(repetition_penalty=shaped)
    # Where they change nothing they cost nothing.
    return Sampling(temperature, int(shape["top_k"]) or None, None if top_p == 1.0 else top_p, min_p or None, shaped)
