"""Drawing tokens from logits. One number between 0 and 1 decides, which depends on the seed and the position alone.

Shapes: B sequences, V vocabulary, C candidates.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options, Sampling


class Draw(NamedTuple):
    """A token to be drawn for a sequence.

    Attributes:
        options: those of its request.
        completion: which of the completions of its prompt the sequence is.
        tokens: the tokens it has so far.
        num_generated: how many of them were generated.
    """

    options: Options
    completion: int
    tokens: Sequence[int]
    num_generated: int

    @property
    def number(self) -> float:
        """A number uniform in [0, 1), which is the same whatever else is in the batch."""
        text = f"{self.options.seed}/{self.completion}/{self.num_generated}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big") / 2**56


class Logprobs(NamedTuple):
    """The log-probabilities of one token, and of those that were likeliest in its place.

    Attributes:
        token: the id that was chosen.
        logprob: its log-probability (natural) by the model, before top-k and the like, at the temperature
            `Options.logprobs_temperature` (1, if nothing is said: the model's own).
        likeliest: (id, log-probability) of the likeliest tokens, the likeliest first.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Drawn(NamedTuple):
    """What was drawn for a sequence: a token (None where logits are not finite), and log-probabilities if asked for."""

    token: int | None
    logprobs: Logprobs | None = None


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw a token for each row of logits [B, V]. What is read back from the device is read at once."""
    if not draws:
        return []
    largest, best = logits.max(-1)
    tokens = best
    if not all(map(_plain, draws)):
        tokens = best.clone()
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for row, one in enumerate(draws):
            groups[one.options.sampling].append(row)
        for sampling, members in groups.items():
            rows = torch.tensor(members, device=logits.device)
            scores = logits[rows].to(torch.promote_types(logits.dtype, torch.float32))
            for row, member in enumerate(members):
                _shape(scores[row], draws[member])
            numbers = [draws[member].number for member in members]
            tokens[rows] = scores.argmax(-1) if sampling.temperature is None else _sample(scores, sampling, numbers)
    tokens = torch.where(largest.isfinite(), tokens, -1)
    made = tokens.tolist()
    found = [Drawn(None if token < 0 else token) for token in made]
    wanted = [row for row, one in enumerate(draws) if one.options.logprobs is not None and made[row] >= 0]
    if wanted:
        rows = torch.tensor(wanted, device=logits.device)
        counts = [draws[row].options.logprobs or 0 for row in wanted]
        temperatures = [draws[row].options.logprobs_temperature for row in wanted]
        scores = logits[rows].double() / torch.tensor(temperatures, dtype=torch.double, device=logits.device)[:, None]
        logprobs = logprobs_of(scores, [made[row] for row in wanted], counts)
        for row, of_row in zip(wanted, logprobs, strict=True):
            found[row] = Drawn(made[row], of_row)
    return found


def logprobs_of(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """The log-probabilities of a token for each row of logits [B, V], and of so many of the likeliest; in float64."""
    logprobs = logits.double().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if max(counts) == 1:  # the first of equals, which is the one that is drawn
        values, ids = logprobs.max(-1, keepdim=True)
    else:
        values, ids = logprobs.topk(min(max(counts), logits.shape[-1]))
    return [
        Logprobs(token, logprob, tuple(zip(top_ids[:count], top[:count], strict=True)))
        for token, logprob, top_ids, top, count in zip(
            tokens, chosen, ids.tolist(), values.tolist(), counts, strict=True
        )
    ]


def _plain(one: Draw) -> bool:
    sampling, min_new_tokens = one.options.sampling, one.options.min_new_tokens
    return sampling.temperature is None and sampling.repetition_penalty is None and one.num_generated >= min_new_tokens


def _shape(scores: Tensor, one: Draw) -> None:
    """Apply a repetition penalty (Keskar et al. 2019, CTRL, section 4.1) and `min_new_tokens` to the scores [V]."""
    if penalty := one.options.sampling.repetition_penalty:
        seen = torch.tensor(sorted(set(one.tokens)), device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if one.num_generated < one.options.min_new_tokens and one.options.stop_token_ids:
        scores[torch.tensor(sorted(one.options.stop_token_ids), device=scores.device)] = -torch.inf


def candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The weights [B, C] of the tokens that may be drawn, not normalised, and which tokens they are (None: all).

    Temperature comes first, then top-k, top-p (Holtzman et al. 2019) and min-p (Nguyen et al. 2024): as transformers
    has it.
    """
    assert sampling.temperature is not None
    # The likeliest at zero: whatever the temperature, nothing overflows.
    ids, scores = None, (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        scores, ids = scores.topk(sampling.top_k)
    elif sampling.top_p is not None:
        scores, ids = scores.sort(descending=True)
    weights = scores.softmax(-1)
    if sampling.top_p is not None:
        # Sorted: before the likeliest there is nothing, so that it always stays.
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= sampling.top_p, 0)
    if sampling.min_p is not None:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0)
    return weights, ids


def _sample(scores: Tensor, sampling: Sampling, numbers: Sequence[float]) -> Tensor:
    """Draw a token [B] for each row of scores: the one at which the running sum of weights passes the row's number."""
    weights, ids = candidates(scores, sampling)
    # A sum of many float32 that itself is float32 would lose the unlikely ones.
    sums = weights.cumsum(-1, dtype=torch.float64)
    targets = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, targets, right=True).clamp_(max=weights.shape[-1] - 1)
    return (places if ids is None else ids.gather(-1, places))[:, 0]
