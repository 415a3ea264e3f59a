"""`BatcherLM` gives what the harness's own HFLM gives of the same model, task by task and request by request."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gptoss_opt.evaluation import BatcherLM
from tests.evaluation.conftest import model
from tests.evaluation.tasks import NUM_DOCUMENTS, choices, texts, whole, written
from tests.finetune.chats import tokenizer

Ours = Callable[..., BatcherLM]
STOPS = ["e", "\n\n", "Q:"]


def evaluated(lm: Any, task: Any, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False)
    settings = {"bootstrap_iters": 0, "verbosity": "ERROR", "log_samples": True, **options}
    return lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, **settings)


def responses(results: dict[str, Any], name: str) -> list[Any]:
    """What the model answered to each request, document by document."""
    return [answer for sample in results["samples"][name] for answer in sample["filtered_resps"]]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def same(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def changed() -> Any:
    """The model with one weight changed."""
    other = model()
    with torch.no_grad():
        other.model.layers[1].self_attn.sinks += 2
    return other


def test_choices(harness: HFLM, ours: Ours, tmp_path: Path) -> None:
    path, lm = written(tmp_path), ours()
    wanted = evaluated(harness, choices(path))
    found = evaluated(lm, choices(path))
    answers = responses(wanted, "sums")
    assert len(answers) == 4 * NUM_DOCUMENTS
    same(responses(found, "sums"), answers)
    assert found["results"] == wanted["results"]
    # What the examples take is computed for the first, and shared by all others.
    stats = lm.batcher.stats()
    assert stats.prefix_tokens > 2 * stats.tokens_in
    with pytest.raises(AssertionError):
        same(responses(evaluated(ours(changed()), choices(path)), "sums"), answers)


@pytest.mark.parametrize("more", [{"do_sample": False, "temperature": 0.0}, {"until": STOPS}])
def test_texts(more: dict[str, Any], harness: HFLM, ours: Ours, tmp_path: Path) -> None:
    path = written(tmp_path)
    wanted = responses(evaluated(harness, texts(path, **more)), "texts")
    assert responses(evaluated(ours(), texts(path, **more)), "texts") == wanted
    assert responses(evaluated(ours(changed()), texts(path, **more)), "texts") != wanted


def test_stop_strings_cut_and_are_looked_for_in_what_is_new(harness: HFLM, ours: Ours) -> None:
    lm = ours()
    free = harness.generate_until(requests("generate_until", ("Hello", {"max_gen_toks": 24})))[0]
    assert len(free) > 12
    pair = free[9:11]
    cases = [
        ("Hello", {"until": [pair], "max_gen_toks": 24}),
        ("Hello", {"until": [free[0]], "max_gen_toks": 24}),
        # It begins in the context, and is none.
        ("Hello", {"until": ["o" + free[0]], "max_gen_toks": 24}),
        ("Hello", {"until": [free[3:6], free[1:3]], "max_gen_toks": 24}),
    ]
    wanted = [harness.generate_until(requests("generate_until", one))[0] for one in cases]
    assert lm.generate_until(requests("generate_until", *cases)) == wanted
    assert wanted[:2] == [free[: free.index(pair)], ""]
    assert wanted[2] == free.split("o" + free[0])[0]
    # What is cut off is not generated either.
    assert lm.batcher.stats().tokens_out < 2 * sum(map(len, wanted)) + 20


def test_long_contexts_lose_their_beginning(ours: Ours) -> None:
    short = HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=1, device="cpu", max_length=40)
    lm = ours(max_length=40)
    text = "the quick brown fox jumps over the lazy dog " * 3
    pairs = requests("loglikelihood", (text, "and on"), ("", "no context"), ("a ", " b"), (text[:39], "x"))
    same(lm.loglikelihood(pairs), short.loglikelihood(pairs))
    generate = requests("generate_until", (text, {"max_gen_toks": 12}))
    assert lm.generate_until(generate) == short.generate_until(generate)
    with pytest.raises(ValueError, match="a continuation has 41 tokens, more than max_length=40"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 41)))
    with pytest.raises(ValueError, match="max_gen_toks is 40, and must be less than max_length=40"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 40})))


def test_whole_texts_in_windows(ours: Ours, tmp_path: Path) -> None:
    path = written(tmp_path)
    short = HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=4, device="cpu", max_length=32)
    found = evaluated(ours(max_length=32), whole(path))
    wanted = evaluated(short, whole(path))
    assert responses(found, "whole") == pytest.approx(responses(wanted, "whole"), abs=1e-3)
    assert found["results"]["whole"]["word_perplexity,none"] == pytest.approx(
        wanted["results"]["whole"]["word_perplexity,none"], rel=1e-4
    )
    # Windows of another length see other contexts.
    other = responses(evaluated(ours(max_length=24), whole(path)), "whole")
    assert other != pytest.approx(responses(wanted, "whole"), abs=1e-3)


def test_chat_templates(harness: HFLM, ours: Ours, tmp_path: Path) -> None:
    lm = ours()
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    for last in (True, False):
        history = chat[:1] if last else chat
        assert lm.apply_chat_template(history, last) == harness.apply_chat_template(history, last)
    assert lm.tokenizer_name == harness.tokenizer_name
    assert lm.chat_template(True) == harness.chat_template(True)
    path = written(tmp_path)
    found, wanted = (evaluated(one, choices(path), apply_chat_template=True) for one in (lm, harness))
    assert found["samples"]["sums"][0]["arguments"] == wanted["samples"]["sums"][0]["arguments"]
    assert "<|start|>" in str(found["samples"]["sums"][0]["arguments"])
    same(responses(found, "sums"), responses(wanted, "sums"))
    made = ours(chat_template_args={"tools": [{}, {}]})
    assert "2 tools" in made.apply_chat_template(chat[:1])


def test_thoughts_are_no_part_of_an_answer(ours: Ours) -> None:
    asked = requests("generate_until", ("Hello", {"max_gen_toks": 24}))
    free = ours().generate_until(asked)[0]
    end = tokenizer().encode(free[10])[0]
    thinking = HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=1, device="cpu", think_end_token=end)
    answer = ours(think_end_token=end).generate_until(asked)
    assert answer == thinking.generate_until(asked) == [free[free.rindex(free[10]) + 1 :].lstrip()]


def test_sampling_follows_torchs_seed(ours: Ours, tmp_path: Path) -> None:
    path = written(tmp_path)
    made = []
    for seed in (0, 0, 1):
        sampled = texts(path, do_sample=True, temperature=2.0, top_p=0.9)
        made.append(responses(evaluated(ours(), sampled, torch_random_seed=seed), "texts"))
    assert made[0] == made[1] != made[2]


def test_while_a_thread_makes_the_steps(ours: Ours, harness: HFLM) -> None:
    lm = ours()
    pairs = requests("loglikelihood", ("abc", "de"), ("ab", "x"))
    with lm.batcher:
        same(lm.loglikelihood(pairs), harness.loglikelihood(pairs))


def test_more_requests_than_a_batcher_is_given_at_once(
    ours: Ours, harness: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptoss_opt.evaluation.asks.MAX_GOING", 3)
    lm, most = ours(), []
    submit = lm.batcher.submit
    monkeypatch.setattr(
        lm.batcher,
        "submit",
        lambda *args, **options: (
            most.append(len(lm.batcher._stepper.engine.requests) + len(lm.batcher._stepper._inbox)),
            submit(*args, **options),
        )[1],
    )
    pairs = requests("loglikelihood", *(("abc" * n, "de") for n in range(1, 12)))
    same(lm.loglikelihood(pairs), harness.loglikelihood(pairs))
    assert max(most) == 2


def test_a_wrong_option_cancels_what_goes_on(ours: Ours) -> None:
    lm = ours()
    wrong = requests("generate_until", ("abc", {"max_gen_toks": 4}), ("abc", {"top_p": 7.0, "do_sample": True}))
    with pytest.raises(ValueError, match="top_p is 7.0"):
        lm.generate_until(wrong)
    while lm.batcher.step():
        pass
    assert lm.batcher.stats().running == lm.batcher.stats().waiting == 0
    with pytest.raises(ValueError, match="max_length, which counts the prompt"):
        lm.generate_until(requests("generate_until", ("abc", {"max_length": 40})))


def test_a_tokenizer_without_an_end_token() -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        BatcherLM(model(), tokenizer=endless)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    block = re.search(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    asked: list[dict[str, Any]] = []
    whole_run, sums = lm_eval.simple_evaluate, choices(written(tmp_path))

    def local(**options: Any) -> dict[str, Any]:
        asked.append(options)
        manager = TaskManager(include_defaults=False)
        return whole_run(model=options["model"], tasks=[sums], task_manager=manager, bootstrap_iters=0)

    # The tasks that it names are not on this machine.
    monkeypatch.setattr(lm_eval, "simple_evaluate", local)
    names = {"model": model(), "tokenizer": tokenizer()}
    exec(block[1], names)
    assert asked[0]["tasks"] == ["arc_challenge", "gsm8k"]
    assert names["results"]["results"]["sums"]["sample_len"] == NUM_DOCUMENTS
