"""Random schedules, computed by a model of numbers that any wrong page would change."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_opt.serve.cache import Cache
from gptoss_opt.serve.scheduler import Scheduler, shares
from tests.serve.symbolic import VOCABULARY, Completion, Machine, groups_of, next_token

PATTERNS = ("sf", "sfsf", "f", "s", "ssf", "ffs")


def expected(prompt: list[int], new: int, pattern: str, window: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens, pattern, window))
    return tokens[len(prompt) :]


def machine(draw: st.DataObject, coming: list[tuple[int, list[int], int]], pattern: str, window: int) -> Machine:
    """One with hardly more pages than the largest sequence needs."""
    page_size, rows = draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 5))
    budget = draw.draw(st.integers(rows, 20))
    most = Cache(1, groups_of(pattern, window), page_size).max_pages
    num_pages = max(most(len(prompt) + new - 1) for _, prompt, new in coming) + draw.draw(st.integers(0, 12))
    return Machine.of(pattern, window, num_pages=num_pages, page_size=page_size, rows=rows, budget=budget)


def arrivals(draw: st.DataObject) -> list[tuple[int, list[int], int]]:
    """(step, prompt, new tokens): prompts over two letters that begin alike."""
    stem = draw.draw(st.lists(st.integers(0, 1), max_size=24))
    made = []
    for _ in range(draw.draw(st.integers(1, 7))):
        prompt = stem[: draw.draw(st.integers(0, len(stem)))] + draw.draw(st.lists(st.integers(0, 1), max_size=8))
        made.append((draw.draw(st.integers(0, 12)), prompt or [0], draw.draw(st.integers(1, 9))))
    return made


def run(
    one: Machine, coming: list[tuple[int, list[int], int]], cancel: random.Random | None = None
) -> list[Completion]:
    """Let sequences arrive and be computed to their end; returns those that were not cancelled."""
    assert not any(one.scheduler.why_never(len(prompt) + new) for _, prompt, new in coming)
    pending = sorted(((at, Completion.of(prompt, new)) for at, prompt, new in coming), key=lambda item: item[0])
    sequences = [sequence for _, sequence in pending]
    for step in range(3000):
        while pending and pending[0][0] <= step:
            one.scheduler.add(pending.pop(0)[1])
        alive = [*one.scheduler.running, *one.scheduler.waiting]
        if not alive and not pending:
            break
        if cancel is not None and alive and cancel.random() < 0.1:
            gone = cancel.choice(alive)
            one.scheduler.remove(gone)
            gone.max_tokens = 0
        works = one.step()
        assert works or not (one.scheduler.running or one.scheduler.waiting)
        for work in works:
            one.check_window(work.sequence)
            if len(work.sequence.tokens) == work.sequence.max_tokens:
                one.scheduler.remove(work.sequence)
    else:
        pytest.fail("it never ends")
    assert one.scheduler.cache.pages.num_used == 0
    assert not one.scheduler.cache.being_computed
    return [sequence for sequence in sequences if sequence.max_tokens]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_sequence_comes_out_as_if_it_were_alone(draw: st.DataObject) -> None:
    pattern, window = draw.draw(st.sampled_from(PATTERNS)), draw.draw(st.integers(1, 9))
    coming = arrivals(draw)
    one = machine(draw, coming, pattern, window)
    cancel = random.Random(draw.draw(st.integers(0, 99))) if draw.draw(st.booleans()) else None
    for sequence in run(one, coming, cancel):
        new = sequence.max_tokens - sequence.prompt_length
        assert sequence.generated == expected(sequence.tokens[: sequence.prompt_length], new, pattern, window)


def rebuilding(broken: str = "") -> tuple[Machine, list[int]]:
    """A machine whose full pages of a prefix are there, and whose sliding ones were taken by another sequence."""
    one = Machine.of("sfs", 3, num_pages=30, page_size=2, rows=2, budget=64)
    prefix = [random.Random(0).randrange(VOCABULARY) for _ in range(24)]
    run(one, [(0, [*prefix, 1], 2)])
    pages = one.scheduler.cache.pages
    for key, page in list(pages._page_of.items()):
        if key[0] == 0:  # of the sliding layers
            pages._forget(page)
            for place in range(2):
                for n in range(2):
                    one.memory.pop((page, place, n), None)
    one.broken = broken
    return one, prefix


def test_the_last_window_is_built_anew_where_only_full_pages_are_left() -> None:
    one, prefix = rebuilding()
    (sequence,) = run(one, [(0, [*prefix, 2, 3], 5)])
    assert sequence.generated == expected([*prefix, 2, 3], 5, "sfs", 3)
    # Two sliding layers of window 3 reach back four tokens.
    assert one.scheduler.num_shared == 20


def test_the_model_of_numbers_notices_writes_to_shared_pages() -> None:
    one, prefix = rebuilding("writes shared")
    run(one, [(0, [*prefix, 2, 3], 5)])
    # The second user of the pages reads what the first has spoiled.
    (sequence,) = run(one, [(0, [*prefix, 4], 5)])
    assert sequence.generated != expected([*prefix, 4], 5, "sfs", 3)


def test_the_model_of_numbers_notices_reads_of_keys_that_are_not_there() -> None:
    one, prefix = rebuilding("forgets first")
    with pytest.raises(AssertionError, match="a key is looked for where none is kept"):
        run(one, [(0, [*prefix, 2, 3], 5)])


def test_what_is_built_anew_is_shared_only_where_it_is_right() -> None:
    one, prefix = rebuilding()
    run(one, [(0, [*prefix, 2, 3], 5)])
    # It began at token 20, and the keys of the upper sliding layer are right from token 22 on. Whoever goes on there
    # sees tokens 20 and 21, too, and must compute them from further back.
    other = [*prefix[:22], (prefix[22] + 1) % VOCABULARY, 5]
    (sequence,) = run(one, [(0, other, 5)])
    assert sequence.generated == expected(other, 5, "sfs", 3)
    # What is right is used: the window before token 24.
    one.scheduler.num_shared = 0
    run(one, [(0, [*prefix, 4], 5)])
    assert one.scheduler.num_shared == 24


def test_the_depth_that_is_rebuilt_is_the_least_that_will_do() -> None:
    one, prefix = rebuilding()
    one.scheduler.cache._depth -= 2
    (sequence,) = run(one, [(0, [*prefix, 2, 3], 5)])
    assert sequence.generated != expected([*prefix, 2, 3], 5, "sfs", 3)


def test_completions_of_one_prompt_share_its_pages() -> None:
    one = Machine.of("sf", 4, num_pages=60, page_size=2, rows=4, budget=64)
    prompt = [1, 2, 3, 4, 5, 6, 0, 1, 2]
    run(one, [(0, prompt, 6)] * 4)
    # The first computes it, the others but its last token.
    assert one.scheduler.num_shared == 3 * 8


def test_shares_leave_half_to_those_behind() -> None:
    assert shares([5, 5, 5], 100) == [5, 5, 5]
    assert shares([1000, 8], 64) == [56, 8]
    assert shares([1000, 1000], 64) == [32, 32]
    assert shares([], 64) == []


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(0, 400))
def test_shares_use_the_whole_budget(lengths: list[int], budget: int) -> None:
    given_to = shares(lengths, budget)
    assert sum(given_to) == min(sum(lengths), budget)
    assert all(0 <= given <= length for given, length in zip(given_to, lengths, strict=True))


def test_a_short_prompt_begins_while_a_long_one_is_computed() -> None:
    one = Machine.of("sf", 4, num_pages=400, page_size=4, rows=4, budget=32)
    long, short = Completion.of([1] * 400, 1), Completion.of([2] * 8, 1)
    one.scheduler.add(long)
    one.step()
    one.scheduler.add(short)
    one.step()
    assert len(short.tokens) == 9
    assert long.num_computed < 400


def test_the_oldest_goes_first_when_pages_run_out() -> None:
    one = Machine.of("f", 1, num_pages=6, page_size=2, rows=3, budget=16)
    first, second = Completion.of([1, 2, 3], 9), Completion.of([4, 5, 6], 9)
    one.scheduler.add(first)
    one.scheduler.add(second)
    while len(first.tokens) < first.max_tokens:
        one.step()
    assert one.scheduler.num_preemptions
    assert len(second.tokens) < second.max_tokens
    assert second in one.scheduler.waiting


def test_nobody_begins_with_a_page_that_another_needs_soon() -> None:
    one = Machine.of("f", 1, num_pages=3, page_size=2, rows=2, budget=16)
    first, second = run(one, [(0, [1, 2, 3], 3), (1, [4, 5], 3)])
    assert one.scheduler.num_preemptions == 0
    assert first.generated == expected([1, 2, 3], 3, "f", 1)
    assert second.generated == expected([4, 5], 3, "f", 1)


def test_what_never_fits_is_told_with_the_numbers() -> None:
    scheduler: Scheduler = Machine.of("sf", 4, num_pages=8, page_size=2, rows=1, budget=4).scheduler
    assert scheduler.why_never(11) is None  # 5 full pages and 3 of a window of 4
    assert "12 tokens need 9 pages of 2 tokens, and there are 8" in str(scheduler.why_never(12))
