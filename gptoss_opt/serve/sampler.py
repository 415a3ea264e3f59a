"""Drawing tokens from logits. One number between 0 and 1 decides, which depends on the seed and the position alone.

Shapes: B sequences, V vocabulary, C candidates.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence as Tokens
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options, Sampling


class Draw(NamedTuple):
    """A token to be drawn for a sequence.

    Attributes:
        options: of its request.
        completion: which of the completions of its prompt it is.
        tokens: what it has so far.
        num_generated: how many of them were generated.
    """

    options: Options
    completion: int
    tokens: Tokens[int]
    num_generated: int

    @property
    def number(self) -> float:
        """Uniform in [0, 1), and the same whatever else is in the batch."""
        text = f"{self.options.seed}/{self.completion}/{self.num_generated}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big") / 2**56


class Drawn(NamedTuple):
    """A token that was drawn; or None, where the logits are not finite.

    Attributes:
        logprob: its log-probability by the model, before temperature and the like; None unless asked for.
        likeliest: the likeliest tokens with theirs.
    """

    token: int | None
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def draw(logits: Tensor, draws: Tokens[Draw]) -> list[Drawn]:
    """A token for each row of logits [B, V]; what is read back from the device is read at once."""
    if not draws:
        return []
    largest, best = logits.max(-1)
    tokens = best
    if any(not one.options.sampling.greedy or _shaped(one) for one in draws):
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
            tokens[rows] = scores.argmax(-1) if sampling.greedy else _sample(scores, sampling, numbers)
    tokens = torch.where(largest.isfinite(), tokens, -1)
    found = [Drawn(None if token < 0 else token) for token in tokens.tolist()]
    wanted = [row for row, one in enumerate(draws) if one.options.logprobs is not None and found[row].token is not None]
    if wanted:
        logprobs = logits[torch.tensor(wanted, device=logits.device)].double().log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[wanted][:, None])[:, 0].tolist()
        most = max(draws[row].options.logprobs or 0 for row in wanted)
        values, ids = logprobs.topk(min(most, logits.shape[-1]))
        for row, logprob, top_ids, top in zip(wanted, chosen, ids.tolist(), values.tolist(), strict=True):
            count = draws[row].options.logprobs
            found[row] = Drawn(found[row].token, logprob, tuple(zip(top_ids[:count], top[:count], strict=True)))
    return found


def _shaped(one: Draw) -> bool:
    """Whether the logits of a greedy draw are changed before the largest is taken."""
    return one.options.sampling.repetition_penalty is not None or one.num_generated < one.options.min_new_tokens


def _shape(scores: Tensor, one: Draw) -> None:
    """Repetition penalty (Keskar et al. 2019, CTRL, section 4.1) and least length, on the scores [V] of a sequence."""
    if penalty := one.options.sampling.repetition_penalty:
        seen = torch.tensor(sorted(set(one.tokens)), device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if one.num_generated < one.options.min_new_tokens and one.options.stop_token_ids:
        scores[torch.tensor(sorted(one.options.stop_token_ids), device=scores.device)] = -torch.inf


def candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The weights [B, C] of the tokens that may be drawn, not normalised, and which tokens they are (None: all).

    Temperature, then top-k, then top-p (Holtzman et al. 2019), then min-p (Nguyen et al. 2024): as transformers has it.
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


def _sample(scores: Tensor, sampling: Sampling, numbers: Tokens[float]) -> Tensor:
    """A token [B] for each row, where the running sum of weights passes its number."""
    weights, ids = candidates(scores, sampling)
    # A sum of many float32 that itself is float32 would lose the unlikely ones.
    sums = weights.cumsum(-1, dtype=torch.float64)
    targets = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, targets, right=True).clamp_(max=weights.shape[-1] - 1)
    return (places if ids is None else ids.gather(-1, places))[:, 0]
