"""Log-probabilities of prompts: those of a full forward, whatever is shared, cut into chunks or computed again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptoss_opt import ContinuousBatcher, GenerationError, with_fast_experts, with_mxfp4_experts
from gptoss_opt.serve.runner import MAX_SCORES
from gptoss_opt.serve.sequence import Scored, SequenceState
from tests.helpers import WINDOW, ids, tiny_model
from tests.serve.conftest import NEW, alone
from tests.serve.test_batcher import SETTINGS

Serve = Callable[..., ContinuousBatcher]


def scored(batcher: ContinuousBatcher, prompt: list[int], count: int, **options: Any) -> list[Any]:
    request = batcher.submit(prompt, prompt_logprobs=count, max_new_tokens=0, logprobs=1, **options)
    assert request.result() == []
    assert request.finish_reason == "length"
    assert [one.token for one in request.prompt_logprobs] == prompt[-count:]
    return request.prompt_logprobs


def truth(prompt: list[int], count: int, model: Any = None) -> tuple[torch.Tensor, list[int]]:
    """The log-probabilities of the last tokens of a prompt, and the likeliest in their places."""
    with torch.no_grad():
        logits = (tiny_model() if model is None else model)(torch.tensor([prompt])).logits[0, -count - 1 : -1].double()
    chosen = torch.tensor(prompt[-count:])[:, None]
    return logits.log_softmax(-1).gather(-1, chosen)[:, 0], logits.argmax(-1).tolist()


def check(found: list[Any], prompt: list[int], count: int, model: Any = None) -> None:
    logprobs, likeliest = truth(prompt, count, model)
    assert torch.allclose(torch.tensor([one.logprob for one in found], dtype=torch.float64), logprobs, atol=1e-5)
    assert [[number for number, _ in one.likeliest] for one in found] == [[one] for one in likeliest]


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_a_full_forward(name: str, serve: Serve) -> None:
    batcher = serve(**SETTINGS[name])
    stem = ids(1, 60, seed=3)[0].tolist()
    asked = [([*stem, *ids(1, n, seed=n)[0].tolist()], n + more) for n, more in ((1, 0), (2, 0), (9, 0), (7, 30))]
    beside = batcher.submit(stem, max_new_tokens=NEW)  # it decodes meanwhile
    for _ in range(2):
        several = [batcher.submit(p, prompt_logprobs=n, max_new_tokens=0, logprobs=1) for p, n in asked]
        for (prompt, count), request in zip(asked, several, strict=True):
            assert request.result() == []
            check(request.prompt_logprobs, prompt, count)
    assert beside.result() == alone(tiny_model(), stem)
    assert batcher.stats().pages_used == 0
    assert (batcher.stats().preemptions > 0) == (name == "hardly any pages")


def test_the_check_notices_a_token_more_or_less(serve: Serve) -> None:
    prompt = ids(1, 20, seed=1)[0].tolist()
    found = scored(serve(), prompt, 5)
    check(found, prompt, 5)
    with pytest.raises(AssertionError):
        check(found, [*prompt[1:-5], 3, *prompt[-5:]], 5)


def test_what_comes_before_is_shared(serve: Serve) -> None:
    batcher = serve(max_batch_tokens=256)
    stem = ids(1, 48, seed=3)[0].tolist()
    ends = [ids(1, 2, seed=n)[0].tolist() for n in range(6)]
    several = [batcher.submit([*stem, *end], prompt_logprobs=2, max_new_tokens=0, logprobs=1) for end in ends]
    for request, end in zip(several, ends, strict=True):
        request.result()
        check(request.prompt_logprobs, [*stem, *end], 2)
    # Logits are wanted after the last token of the stem, so that its last page is computed by each.
    assert batcher.stats().prefix_tokens == 5 * 32
    assert batcher.stats().tokens_in == 49 + 5 * 17


def test_pages_beyond_the_first_score_are_not_used() -> None:
    sequence = SequenceState([*range(50)], 50, Scored(20, tuple(range(21, 50))))
    assert sequence.first_wanted == 20
    assert sequence.scored.within(0, 30) == range(20, 30)
    assert SequenceState([*range(50)], 50).first_wanted == 49
    assert Scored().start == sys.maxsize
    assert not Scored().within(0, 1 << 40)


def test_windows_that_are_gone_are_built_anew(serve: Serve) -> None:
    # The full layer's pages of the stem stay, and those of the sliding layers went to others.
    batcher = serve(page_size=4, max_num_sequences=1)
    stem = ids(1, 60, seed=3)[0].tolist()
    batcher.generate([stem], max_new_tokens=1, progress=False)
    for number, count in ((1, 3), (2, 25), (3, WINDOW)):
        prompt = [*stem, *ids(1, count, seed=number)[0].tolist()]
        check(scored(batcher, prompt, count + 20), prompt, count + 20)
    assert batcher.stats().prefix_tokens > 0


def test_a_whole_prompt_beyond_a_block_of_logits(serve: Serve) -> None:
    prompt = ids(1, 2 * MAX_SCORES + 9, seed=1)[0].tolist()
    check(scored(serve(max_batch_tokens=512), prompt, len(prompt) - 1), prompt, len(prompt) - 1)


def test_scores_and_new_tokens(serve: Serve) -> None:
    prompt = ids(1, 30, seed=2)[0].tolist()
    request = serve().submit(prompt, prompt_logprobs=12, logprobs=1, max_new_tokens=NEW)
    assert request.result() == alone(tiny_model(), prompt)
    check(request.prompt_logprobs, prompt, 12)
    assert len(request.logprobs) == NEW


@pytest.mark.parametrize("wrap", [with_mxfp4_experts, with_fast_experts])
def test_scores_with_other_wrappers(wrap: Any, serve: Serve) -> None:
    prompt = ids(1, 30, seed=2)[0].tolist()
    check(scored(serve(wrap(tiny_model())), prompt, 12), prompt, 12)


def test_the_longest_prompt_is_one_token_longer(serve: Serve) -> None:
    # Its last token is not computed, as that of a window of the whole context.
    batcher = serve(tiny_model(max_position_embeddings=32))
    prompt = ids(1, 33, seed=2)[0].tolist()
    check(scored(batcher, prompt, 32), prompt, 32, tiny_model(max_position_embeddings=33))
    with pytest.raises(ValueError, match="34 tokens of the prompt"):
        scored(batcher, [*prompt, 5], 32)


def test_what_is_refused(serve: Serve) -> None:
    batcher = serve()
    with pytest.raises(ValueError, match="prompt_logprobs is 3, and the prompt has 3 tokens.*ask for 2 at most"):
        batcher.submit([1, 2, 3], prompt_logprobs=3)
    with pytest.raises(ValueError, match="prompt_logprobs is -1, and must be a whole number of at least 0"):
        batcher.submit([1, 2, 3], prompt_logprobs=-1)
    with pytest.raises(ValueError, match="max_new_tokens is 0, and must be .* at least 1; or ask for prompt_logprobs"):
        batcher.submit([1, 2, 3], prompt_logprobs=0, max_new_tokens=0)


def test_logits_that_are_not_finite(serve: Serve) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    batcher = serve(model)
    request = batcher.submit([5, 7, 6], prompt_logprobs=2, max_new_tokens=0)
    with pytest.raises(GenerationError, match="not finite"):
        request.result()
    assert len(scored(batcher, [5, 6, 8], 2)) == 2
