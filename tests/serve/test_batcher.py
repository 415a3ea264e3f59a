"""What comes out is what `generate` gives, whatever is computed beside it; and the options mean what they say."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from gptoss_opt import (
    CompatibilityError,
    ContinuousBatcher,
    load,
    stack_of,
    with_fast_experts,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.kernels import native
from gptoss_opt.kernels.paged_attention.impl import native as paged_native
from gptoss_opt.serve.options import Options, Sampling
from gptoss_opt.serve.sampler import Draw, candidates, draw
from tests.helpers import GOLDEN, ids, tiny_model
from tests.serve.conftest import NEW, alone

Serve = Callable[..., ContinuousBatcher]
Prompts = list[list[int]]

# A page of the tiny model takes page_size * 512 bytes in float32, for its two sliding layers or its full one.
SETTINGS = {
    "plain": {},
    "chunks of seven": {"max_batch_tokens": 7},
    "one at a time": {"max_num_sequences": 1},
    "pages of one token": {"page_size": 1},
    "pages beyond the window": {"page_size": 32},
    "no sharing": {"share_prefixes": False},
    "hardly any pages": {"page_size": 4, "kv_memory": 4 * 512 * 26, "max_batch_tokens": 16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_generate(name: str, serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    batcher = serve(**SETTINGS[name])
    for turn in range(2):
        assert batcher.generate(prompts, max_new_tokens=NEW, progress=False) == expected
        stats = batcher.stats()
        assert stats.pages_used == stats.running == stats.waiting == 0
        assert (stats.prefix_tokens > 0) == (turn == 1 and name != "no sharing") or name == "hardly any pages"
    assert (batcher.stats().preemptions > 0) == (name == "hardly any pages")


def test_generate_would_notice_other_pages(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    batcher = serve()
    wrong = batcher._stepper.engine.runner.memory
    wrong.block_tables = wrong.block_tables.new_full(wrong.block_tables.shape, 1)
    told = type(wrong).inputs
    wrong.inputs = lambda batch: told(wrong, batch._replace(new_pages=[]))
    assert batcher.generate(prompts, max_new_tokens=NEW, progress=False) != expected


@pytest.mark.skipif(native.why_not("cpu", torch.float32) is not None, reason="the native library is not built here")
def test_units_of_work_are_worked_out_once_a_step(
    serve: Serve, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    inner = paged_native.blocks_of
    monkeypatch.setattr(paged_native, "blocks_of", lambda *args: (calls.append(args), inner(*args))[1])
    batcher = serve(tiny_model())
    assert batcher.model.config.num_hidden_layers == 3
    batcher.generate(prompts, max_new_tokens=4, progress=False)
    assert len(calls) == batcher.stats().num_steps


@pytest.mark.parametrize(
    ("wrap", "dtype"),
    [(with_mxfp4_experts, torch.float32), (with_mxfp4_experts, torch.float64), (with_fast_experts, torch.float32)],
)
def test_with_other_wrappers(wrap: Any, dtype: torch.dtype, serve: Serve, prompts: Prompts) -> None:
    model = wrap(with_flash_attention(tiny_model(dtype)))
    wanted, before = [alone(model, prompt) for prompt in prompts[:3]], stack_of(model)
    batcher = serve(model)
    assert batcher.generate(prompts[:3], max_new_tokens=NEW, progress=False) == wanted
    batcher.close()
    assert stack_of(model) == before


def test_the_oracle_checkpoint(serve: Serve) -> None:
    model = load(GOLDEN, with_mxfp4_experts(), dtype=torch.float32)
    vocabulary = model.config.vocab_size
    some = [torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 30, 11)]
    wanted = [alone(model, prompt, eos_token_id=None) for prompt in some]
    assert serve(model).generate(some, max_new_tokens=NEW, eos_token_id=[], progress=False) == wanted


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_schedule_gives_the_same(prompts: Prompts, expected: Prompts, data: st.DataObject) -> None:
    number = st.integers
    rows = data.draw(number(1, 4))
    batcher = ContinuousBatcher(
        tiny_model(),
        max_num_sequences=rows,
        max_batch_tokens=data.draw(number(rows, 40)),
        page_size=data.draw(number(1, 12)),
        kv_memory=512 * data.draw(number(140, 400)),
    )
    going = {}
    for n in data.draw(st.permutations(range(len(prompts)))):
        going[n] = batcher.submit(prompts[n], max_new_tokens=NEW)
        neighbour = batcher.submit(prompts[n][:9], max_new_tokens=NEW)
        for _ in range(data.draw(number(0, 6))):
            batcher.step()
        if data.draw(st.booleans()):
            neighbour.cancel()
    for n, request in going.items():
        assert request.result() == expected[n]
    while batcher.step():
        pass
    assert batcher.stats().pages_used == 0
    batcher.close()


def test_logprobs_are_those_of_a_full_forward(serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    batcher = serve(model)
    requests = [batcher.submit(prompt, max_new_tokens=8, logprobs=5, temperature=0.9, seed=1) for prompt in prompts]
    plain = tiny_model()
    for request in requests:
        tokens = request.result()
        whole = torch.tensor([[*request.prompt, *tokens]])
        with torch.no_grad():
            logits = plain(whole).logits[0, len(request.prompt) - 1 : -1]
        truth = logits.double().log_softmax(-1)
        assert len(request.logprobs) == 8
        for row, one in zip(truth, request.logprobs, strict=True):
            assert abs(one.logprob - float(row[one.token])) < 1e-5
            values, top = row.topk(5)
            assert [number for number, _ in one.likeliest] == top.tolist()
            assert torch.allclose(torch.tensor([value for _, value in one.likeliest]), values.float(), atol=1e-5)


def test_logprobs_at_a_temperature(serve: Serve, prompts: Prompts) -> None:
    model = tiny_model(torch.float64)
    model.set_experts_implementation("eager")
    options = {"max_new_tokens": 8, "temperature": 0.5, "top_k": 4, "seed": 1, "progress": False}
    batcher = serve(model)
    made = batcher.generate(prompts, return_logprobs=True, logprobs_temperature=0.5, **options)
    own = batcher.generate(prompts, return_logprobs=True, **options)
    assert [tokens for tokens, _ in made] == [tokens for tokens, _ in own] == batcher.generate(prompts, **options)
    for prompt, (tokens, logprobs), (_, others) in zip(prompts, made, own, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        for temperature, found in ((0.5, logprobs), (1.0, others)):
            truth = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            assert found == pytest.approx(truth.tolist(), abs=1e-9)
        assert max(abs(a - b) for a, b in zip(logprobs, others, strict=True)) > 1e-2


def test_a_length_bounds_the_pages(serve: Serve) -> None:
    batcher = serve(kv_memory="auto", max_length=40)
    # Of four sequences: three pages in the full layer, and two behind the window of 8 in those that slide.
    assert batcher.stats().num_pages == 4 * (3 + 2)
    assert len(batcher.submit([1] * 32, max_new_tokens=8, eos_token_id=-1).result()) == 8
    with pytest.raises(ValueError, match=r"more than the 40 that the model .* or the batcher \(max_length\) allows"):
        batcher.submit([1] * 32, max_new_tokens=9)


def test_a_seed_gives_the_same_whatever_is_beside_it(serve: Serve, prompts: Prompts) -> None:
    sampled = {"max_new_tokens": NEW, "temperature": 1.5, "top_p": 0.95}
    by_itself = serve(max_num_sequences=1).submit(prompts[1], seed=7, **sampled).result()
    batcher = serve(max_batch_tokens=9)
    beside = [batcher.submit(prompt, seed=seed, **sampled) for seed, prompt in enumerate(prompts)]
    again = batcher.submit(prompts[1], seed=7, **sampled)
    other = batcher.submit(prompts[1], seed=8, **sampled)
    assert again.result() == by_itself
    assert other.result() != by_itself
    assert all(len(request.result()) <= NEW for request in beside)


def test_without_a_seed_torch_decides(serve: Serve, prompts: Prompts) -> None:
    batcher, made = serve(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(batcher.submit(prompts[0], max_new_tokens=NEW, temperature=2.0).result())
    assert made[0] == made[1] != made[2]


def test_completions_of_one_prompt(serve: Serve, prompts: Prompts) -> None:
    batcher = serve()
    found = batcher.generate(
        [prompts[4]], max_new_tokens=6, do_sample=True, temperature=3.0, num_return_sequences=3, seed=3, progress=False
    )
    assert len(found) == 3
    assert len({tuple(tokens) for tokens in found}) == 3
    assert batcher.stats().prefix_tokens == 2 * 48  # all whole pages of 16 but the last, which has the last token
    request = batcher.submit(prompts[4], max_new_tokens=6, temperature=3.0, num_return_sequences=3, seed=3)
    assert [one.result() for one in request.completions] == found


def test_a_shared_prefix_is_computed_once(serve: Serve) -> None:
    stem = ids(1, 48, seed=3)[0].tolist()
    several = [[*stem, *ids(1, 9, seed=n)[0].tolist()] for n in range(6)]
    wanted = [alone(tiny_model(), prompt) for prompt in several]
    batcher = serve(max_num_sequences=6, max_batch_tokens=256)
    assert batcher.generate(several, max_new_tokens=NEW, progress=False) == wanted
    assert batcher.stats().prefix_tokens == 5 * 48


def test_stops(serve: Serve, prompts: Prompts, expected: Prompts, tokenizer: Any) -> None:
    batcher = serve()
    whole = expected[2]
    stop = whole[5]
    cut = whole[: whole.index(stop) + 1]
    request = batcher.submit(prompts[2], max_new_tokens=NEW, stop_token_ids=[stop])
    assert (request.result(), request.finish_reason) == (cut, "stop")
    request = batcher.submit(prompts[2], max_new_tokens=NEW, stop_token_ids=torch.tensor([stop, -1]), eos_token_id=-1)
    assert (request.result(), request.finish_reason) == (cut, "stop")
    request = batcher.submit(prompts[2], GenerationConfig(max_new_tokens=NEW, eos_token_id=[stop, 99]))
    assert (request.result(), request.finish_reason) == (cut, "stop")
    later = batcher.submit(prompts[2], max_new_tokens=NEW, stop_token_ids=[stop], min_new_tokens=len(cut) + 1).result()
    assert later[: len(cut) - 1] == cut[:-1]
    assert later[len(cut) - 1] != stop
    text = tokenizer.decode(whole[4:7])
    request = batcher.submit(
        prompts[2], max_new_tokens=NEW, min_new_tokens=9, stop_strings=["never", text], tokenizer=tokenizer
    )
    assert tokenizer.decode(request.result()).endswith(text)
    assert (len(request.tokens), request.finish_reason) == (7, "stop")
    request = batcher.submit(prompts[2], max_new_tokens=5)
    assert (request.result(), request.finish_reason) == (whole[:5], "length")


def test_texts(serve: Serve, prompts: Prompts, expected: Prompts, tokenizer: Any) -> None:
    texts = [tokenizer.decode(prompt) for prompt in prompts[:3]]
    found = serve().generate(texts, max_new_tokens=NEW, tokenizer=tokenizer, progress=False)
    assert found == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected[:3]]


def test_the_models_own_config_is_where_options_come_from(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=None, do_sample=True, temperature=0.5)
    batcher = serve(model)
    assert len(batcher.submit(prompts[0]).result()) == 7
    assert batcher.submit(prompts[0], do_sample=False).result() == expected[0][:7]
    assert batcher.submit(prompts[0], temperature=0).result() == expected[0][:7]
    assert batcher.submit(prompts[0], temperature=1e-45, max_new_tokens=7).result() == expected[0][:7]
    assert batcher.submit(prompts[0], do_sample=False, guidance_scale=1.0, num_beams=1).result() == expected[0][:7]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=3)
    assert len(batcher.submit([1] * 3, greedy, max_length=10).result()) == 7
    assert batcher.submit(prompts[0], greedy, temperature=5.0, seed=1).result() != expected[0][:3]
    assert batcher.submit(prompts[0], top_p=Fraction(1, 10**6), temperature=np.float16(1)).result() == expected[0][:7]
    stops = batcher.generate(prompts[:1] * 2, greedy, stop_token_ids=iter([expected[0][1]]), progress=False)
    assert stops == [expected[0][:2]] * 2
    configs = [GenerationConfig(max_new_tokens=n, do_sample=False) for n in (2, 3)]
    assert batcher.generate(prompts[:2], configs, progress=False) == [expected[0][:2], expected[1][:3]]


WRONG = {
    "num_beams": ({"num_beams": 4}, "does not implement num_beams=4"),
    "guidance_scale": ({"guidance_scale": 2.0}, "does not implement guidance_scale=2.0"),
    "no such field": ({"max_tokens": 4}, "GenerationConfig has no field 'max_tokens'"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0, and must be a whole number of at least 1"),
    "max_length": ({"max_length": 3}, "max_length is 3, and the prompt has 3 tokens already"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0, and must be a number of at least 0"),
    "top_p": ({"top_p": 1.5}, "top_p is 1.5, and must be a number above 0, up to 1"),
    "stop strings": ({"stop_strings": "x"}, "stop_strings are texts: give a tokenizer"),
    "stop ids": ({"stop_token_ids": [1.5]}, "stop_token_ids is .1.5., and must be a token id, or several"),
    "part of a token": ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, and must be a whole number"),
    "part of a rank": ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5, and must be a whole number"),
    "part of a logprob": ({"logprobs": 2.5}, "logprobs is 2.5, and must be a whole number"),
    "no temperature": ({"logprobs_temperature": 0}, "logprobs_temperature is 0, and must be a number above 0"),
    "more than there are numbers": ({"temperature": 10**400}, "temperature is 1000.*, and must be a number"),
    "no strings": ({"stop_strings": 5}, "stop_strings are texts, not 5"),
    "less than one": ({"num_return_sequences": -1}, "num_return_sequences is -1"),
    "a word": ({"do_sample": "no"}, "do_sample is 'no', and must be True or False"),
    "no end": ({"temperature": math.inf}, "temperature is inf, and must be a number"),
    "zero that means something": ({"forced_eos_token_id": 0}, "does not implement forced_eos_token_id=0"),
    "more than the most": ({"min_new_tokens": 30}, "min_new_tokens is 30, more than max_new_tokens, 20"),
    "greedy completions": ({"num_return_sequences": 2}, "greedy completions of one prompt are all the same"),
    "too long": (
        {"max_new_tokens": 200_000},
        r"more than the 131072 that the model \(max_position_embeddings\) or the batcher",
    ),
    "too many pages": ({"max_new_tokens": 100_000}, "100003 tokens need 6253 pages of 16 tokens, and there are 128"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_is_said(name: str, serve: Serve, prompts: Prompts) -> None:
    options, message = WRONG[name]
    batcher = serve()
    with pytest.raises(ValueError, match=message):
        batcher.submit(prompts[0], **options)
    with pytest.raises(ValueError, match=message):
        batcher.generate(prompts[:1], progress=False, **options)
    assert not batcher.step()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1, 128], "holds the id 128, and the model has 0 to 127"),
        ([-1], "holds the id -1"),
        ([1.5], "a list of token ids, not \\[1.5\\]"),
        ([[1, 2]], "a list of token ids"),
        ("text", "give its token ids, or a tokenizer"),
        (None, "a list of token ids, not None"),
    ],
)
def test_prompts_that_are_none(prompt: Any, message: str, serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    batcher = serve()
    with pytest.raises(ValueError, match=message):
        batcher.submit(prompt)
    with pytest.raises(ValueError, match=f"prompt 1: .*{message}"):
        batcher.generate([prompts[0], prompt], progress=False)
    good, bad = batcher.generate([prompts[0], prompt], max_new_tokens=NEW, progress=False, return_exceptions=True)
    assert good == expected[0]
    assert isinstance(bad, ValueError)
    several = batcher.generate(
        [prompt, prompts[0]],
        max_new_tokens=2,
        num_return_sequences=2,
        do_sample=True,
        progress=False,
        return_exceptions=True,
    )
    assert [isinstance(one, ValueError) for one in several] == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_sequences": 0}, "max_num_sequences is 0"),
        ({"max_num_sequences": 8, "max_batch_tokens": 4}, "max_batch_tokens is 4, less than max_num_sequences, 8"),
        ({"kv_memory": "most"}, "kv_memory is 'most', and must be a number of at least 1 of bytes, or \"auto\""),
        ({"kv_memory": 1000}, "kv_memory of 1,000 bytes is less than a page"),
        ({"page_size": 1.5}, "page_size is 1.5"),
        ({"max_length": 0}, "max_length is 0, and must be a number of at least 1, or None"),
    ],
)
def test_batchers_that_make_no_sense(options: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        ContinuousBatcher(model, **options)
    assert not stack_of(model)


def test_models_that_cannot_be_served() -> None:
    with pytest.raises(CompatibilityError, match="Linear is not a GPT-OSS model"):
        ContinuousBatcher(torch.nn.Linear(2, 2))
    with pytest.raises(CompatibilityError, match="GptOssModel generates no text"):
        ContinuousBatcher(tiny_model().model)
    with pytest.raises(CompatibilityError, match="attention_dropout"):
        ContinuousBatcher(tiny_model(attention_dropout=0.1))


def test_the_model_is_left_as_it_was(prompts: Prompts) -> None:
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, state = dict(vars(model.config)), {name: one.clone() for name, one in model.state_dict().items()}
    batcher = ContinuousBatcher(model, kv_memory=1 << 20)
    assert len(stack_of(model)) == 1
    assert not model.training
    batcher.generate(prompts, max_new_tokens=4, progress=False)
    batcher.close()
    assert not stack_of(model)
    assert dict(vars(model.config)) == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


def test_two_batchers_on_one_model(prompts: Prompts, expected: Prompts) -> None:
    model = tiny_model().train()
    first, second = (ContinuousBatcher(model, kv_memory=1 << 20) for _ in range(2))
    first.close()
    assert second.generate(prompts[:2], max_new_tokens=NEW, progress=False) == expected[:2]
    second.close()
    assert model.training
    assert not stack_of(model)


def test_inside_inference_mode(prompts: Prompts, expected: Prompts) -> None:
    with torch.inference_mode():
        batcher = ContinuousBatcher(tiny_model(), kv_memory=1 << 20)
        assert batcher.generate(prompts[:2], max_new_tokens=NEW, progress=False) == expected[:2]
    with batcher:
        assert batcher.submit(prompts[2], max_new_tokens=NEW).result(timeout=60) == expected[2]


def test_weights_that_have_changed(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    model = tiny_model()
    batcher = serve(model)
    batcher.generate(prompts, max_new_tokens=NEW, progress=False)
    going = batcher.submit(prompts[4], max_new_tokens=NEW)
    batcher.step()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.neg_()
    batcher.clear_prefixes()
    going.result()
    wanted = [alone(model, prompt) for prompt in prompts]
    assert wanted != expected
    assert batcher.generate(prompts, max_new_tokens=NEW, progress=False) == wanted


@pytest.mark.parametrize("seed", [None, 5])
def test_streams_come_as_they_are_made(seed: int | None, serve: Serve, prompts: Prompts) -> None:
    with serve() as batcher:
        options = {} if seed is None else {"temperature": 0.8, "seed": seed}
        first, second = (batcher.submit(prompt, max_new_tokens=NEW, **options) for prompt in prompts[1:3])
        tokens = []
        for token in first:
            tokens.append(token)
            assert first.tokens[: len(tokens)] == tokens
        assert tokens == first.result() == list(first)
        assert second.result(timeout=60) == list(second)


@pytest.mark.parametrize("entered", [True, False])
def test_async_streams(entered: bool, serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    batcher = serve()

    async def read(request: Any) -> list[int]:
        return [token async for token in request]

    async def both() -> list[list[int]]:
        return await asyncio.gather(*(read(batcher.submit(prompt, max_new_tokens=NEW)) for prompt in prompts))

    if entered:
        with batcher:
            assert asyncio.run(both()) == expected
    else:
        assert asyncio.run(both()) == expected


def test_stats(serve: Serve, prompts: Prompts) -> None:
    batcher = serve(kv_memory=512 * 16 * 100)
    found = batcher.generate(prompts, max_new_tokens=5, progress=False)
    stats = batcher.stats()
    assert stats.tokens_in == sum(map(len, prompts))
    assert stats.tokens_out == sum(map(len, found))
    assert stats.num_pages == 100
    assert stats.kv_bytes == 512 * 16 * 100
    assert stats.finished == len(prompts)
    assert set(stats.time_to_first_token) == set(stats.time_between_tokens) == {50, 90, 99}
    assert stats.cuda_graphs == "none: the model is on cpu"
    assert repr(stats) == str(stats)
    page = stats._repr_html_()
    for name in vars(stats):
        assert name in str(stats)
        assert f">{name}</td>" in page
    assert f">{stats.tokens_in}</td>" in page
    lines = stats.prometheus().splitlines()
    told = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    assert told["gptoss_opt_tokens_out"] == stats.tokens_out
    assert told['gptoss_opt_time_to_first_token_seconds{quantile="0.5"}'] == pytest.approx(
        stats.time_to_first_token[50]
    )
    assert "# TYPE gptoss_opt_tokens_out counter" in lines
    assert "# TYPE gptoss_opt_running gauge" in lines
    assert len(told) == len({line.split()[2] for line in lines if line[0] == "#"}) + 4  # three quantiles, twice


def test_bytes_of_pages_follow_the_formula(serve: Serve) -> None:
    model, tokens = tiny_model(), 100
    batcher = serve(model, page_size=4)
    request = batcher.submit(ids(1, tokens - 1)[0].tolist(), max_new_tokens=50)
    while len(request.tokens) < 3:
        batcher.step()
    config = model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * 4
    # The full layer keeps all tokens; the sliding ones a window of 8, in at most 3 pages of 4. Two of three layers
    # slide, and a page has room for two.
    full = -(-(tokens + 1) // 4)
    stats = batcher.stats()
    assert stats.pages_used in (full + 2, full + 3)
    assert stats.kv_bytes // stats.num_pages == 2 * 4 * per_token


# Sampling.


def processed(scores: torch.Tensor, sampling: Sampling, tokens: list[int]) -> torch.Tensor:
    """The distribution that transformers' own processors give."""
    row, seen = scores[None].clone(), torch.tensor([tokens])
    if sampling.repetition_penalty:
        row = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, row)
    row = TemperatureLogitsWarper(sampling.temperature)(seen, row)
    if sampling.top_k:
        row = TopKLogitsWarper(sampling.top_k)(seen, row)
    if sampling.top_p:
        row = TopPLogitsWarper(sampling.top_p)(seen, row)
    if sampling.min_p:
        row = MinPLogitsWarper(sampling.min_p)(seen, row)
    return row.softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_candidates_are_those_of_transformers(sampling: Sampling) -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    weights, numbers = candidates(scores, sampling)
    ours = weights / weights.sum(-1, keepdim=True)
    if numbers is not None:
        ours = torch.zeros_like(scores).scatter_(-1, numbers, ours)
    theirs = torch.stack([processed(row, sampling, [0]) for row in scores])
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    sampling = Sampling(temperature=0.8, top_k=6, repetition_penalty=1.5)
    count, tokens = 20_000, [3, 5]
    draws = [Draw(Options(9, sampling=sampling, seed=seed), 0, tokens, 0) for seed in range(count)]
    found = Counter(one.token for one in draw(scores.expand(count, -1), draws))
    for token, chance in enumerate(processed(scores, sampling, tokens).tolist()):
        spread = math.sqrt(count * chance * (1 - chance))
        assert abs(found[token] - count * chance) <= 5 * spread
    # And the penalty is seen.
    assert not torch.allclose(processed(scores, sampling, tokens), processed(scores, sampling, [0]), atol=0.01)
