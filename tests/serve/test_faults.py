"""What goes wrong is told to whom it concerns, and nobody else loses anything."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from gptoss_opt import ContinuousBatcher, GenerationError, stack_of, undo, with_flash_attention
from gptoss_opt.serve.graphs import DecodeGraphs
from tests.helpers import ids, tiny_model
from tests.serve.conftest import NEW, alone

Serve = Callable[..., ContinuousBatcher]
Prompts = list[list[int]]


def failing(model: Any, when: Callable[[], bool], error: BaseException) -> None:
    """Let the forward of a model raise."""
    inner = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if when():
            raise error
        return inner(*args, **kwargs)

    model.model.forward = forward


def test_two_thousand_requests_with_random_cancels(serve: Serve) -> None:
    model = tiny_model(num_hidden_layers=2)
    batcher = serve(model, max_num_sequences=64, max_batch_tokens=512, page_size=4, kv_memory=512 * 4 * 120)
    chance = random.Random(0)
    stem = ids(1, 8)[0].tolist()
    wanted: dict[int, list[int]] = {}
    requests = []
    for n in range(2000):
        requests.append(batcher.submit([*stem[: n % 8], 2 + n % 50], max_new_tokens=1 + n % 3))
        if chance.random() < 0.3:
            requests[-1].cancel()
        if chance.random() < 0.02:
            batcher.step()
            chance.choice(requests).cancel()
    while batcher.step():
        pass
    assert all(request.done for request in requests)
    assert batcher.stats().pages_used == batcher.stats().waiting == 0
    done = [(n, request) for n, request in enumerate(requests) if request.finish_reason != "cancelled"]
    assert len(done) > 1000
    for n, request in done:
        kind = (n % 8) * 1000 + n % 50 * 10 + n % 3
        assert wanted.setdefault(kind, request.tokens) == request.tokens
        assert request.finish_reason == "stop" or len(request.tokens) == 1 + n % 3


def test_one_thread_submits_while_others_read(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    found: dict[int, list[int]] = {}
    with serve() as batcher:
        requests = [batcher.submit(prompts[0], max_new_tokens=NEW)]

        def submit() -> None:
            for prompt in prompts[1:]:
                requests.append(batcher.submit(prompt, max_new_tokens=NEW))
                time.sleep(0.01)

        def read(number: int) -> None:
            while len(requests) <= number:
                time.sleep(0.001)
            found[number] = list(requests[number])

        threads = [threading.Thread(target=submit)]
        threads += [threading.Thread(target=read, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert [found[number] for number in range(len(prompts))] == expected


def test_a_reader_that_stops_holds_nobody_up(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    with serve() as batcher:
        stopped = iter(batcher.submit(prompts[0], max_new_tokens=NEW))
        next(stopped)
        assert batcher.submit(prompts[1], max_new_tokens=NEW).result(timeout=60) == expected[1]
    assert list(stopped) == expected[0][1:]


@pytest.mark.parametrize("background", [True, False])
def test_an_exception_in_the_forward(background: bool, serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    batcher = serve(model, max_num_sequences=2)
    steps = iter(range(100))
    failing(model, lambda: next(steps) == 4, RuntimeError("the model broke"))
    if background:
        batcher.__enter__()
    requests = [batcher.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
    for request in requests:
        with pytest.raises(GenerationError, match="the model broke") as caught:
            request.result(timeout=60)
        assert caught.value.tokens == request.tokens
        assert request.finish_reason == "error"
    with pytest.raises(GenerationError, match="the batcher is closed .the model broke.. Make another"):
        batcher.submit(prompts[0])
    with pytest.raises(GenerationError, match="the model broke"):
        batcher.generate(prompts, progress=False)
    batcher.close()
    assert not stack_of(model)


def test_an_exception_during_generate(serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    batcher = serve(model)
    failing(model, lambda: True, RuntimeError("the model broke"))
    with pytest.raises(GenerationError, match="6 of 6 could not be completed: the step failed: .*the model broke"):
        batcher.generate(prompts, progress=False)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where these tests are run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_during_generate_leaves_the_batcher_usable(
    serve: Serve, prompts: Prompts, expected: Prompts
) -> None:
    model = tiny_model()
    batcher = serve(model)
    steps = iter(range(1000))

    def interrupt(*_: Any) -> None:
        if next(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    hook = model.model.norm.register_forward_pre_hook(interrupt)
    kept = batcher.submit(prompts[3], max_new_tokens=NEW)
    with pytest.raises(KeyboardInterrupt):
        batcher.generate(prompts, max_new_tokens=NEW, progress=False)
    hook.remove()
    assert kept.result() == expected[3]
    assert batcher.generate(prompts, max_new_tokens=NEW, progress=False) == expected
    assert batcher.stats().pages_used == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_what_is_no_exception_ends_all_as_well(error: BaseException, serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    failing(model, lambda: True, error)
    with serve(model) as batcher:
        request = batcher.submit(prompts[0])
        with pytest.raises(GenerationError, match=type(error).__name__):
            request.result(timeout=60)
    batcher = serve(model)
    request = batcher.submit(prompts[0])
    with pytest.raises(type(error)):
        batcher.step()
    with pytest.raises(GenerationError, match=type(error).__name__):
        request.result(timeout=60)


def test_a_tokenizer_that_fails_ends_one_request(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    class Broken:
        def decode(self, *_: Any, **__: Any) -> str:
            raise KeyError("no such piece")

    batcher = serve()
    good = batcher.submit(prompts[0], max_new_tokens=NEW)
    bad = batcher.submit(prompts[1], max_new_tokens=NEW, stop_strings="x", tokenizer=Broken())
    with pytest.raises(GenerationError, match="the tokenizer failed on the new token: KeyError"):
        bad.result()
    assert good.result() == expected[0]
    with pytest.raises(GenerationError, match="2 of 2 could not be .*: the tokenizer failed on the new tokens") as e:
        batcher.generate(prompts[:2], max_new_tokens=NEW, tokenizer=Broken(), progress=False)
    assert [one.tokens for one in e.value.results] == expected[:2]
    with pytest.raises(ValueError, match="the tokenizer failed on the prompt: TypeError"):
        batcher.submit("text", tokenizer=Broken())


def test_a_loop_that_is_gone_holds_nobody_up(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    async def first_of(request: Any) -> int:
        stream = aiter(request)
        left.append(stream)
        return await anext(stream)

    left: list[Any] = []
    with serve() as batcher:
        request = batcher.submit(prompts[0], max_new_tokens=NEW)
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(first_of(request)) == expected[0][0]
        loop.close()  # the stream has not ended, and is still told of every token
        assert request.result(timeout=60) == expected[0]


@pytest.mark.parametrize("what", ["close", "step", "clear_prefixes"])
def test_to_wait_for_a_step_from_within_is_refused(what: str, serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    with serve(model) as batcher:
        hook = model.model.norm.register_forward_pre_hook(lambda *_: getattr(batcher, what)())
        with pytest.raises(GenerationError, match="cannot be used from within one of its own steps"):
            batcher.submit(prompts[0]).result(timeout=60)
        hook.remove()


def test_attention_that_is_taken_off_meanwhile(serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    batcher = serve(model)
    undo(model, with_flash_attention)
    with pytest.raises(GenerationError, match="with_flash_attention was taken off a model that is served"):
        batcher.submit(prompts[0]).result()


def test_a_model_that_is_cast_meanwhile(serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    batcher = serve(model)
    model.to(torch.bfloat16)
    with pytest.raises(GenerationError, match="the pages hold torch.float32, and the new keys are torch.bfloat16"):
        batcher.submit(prompts[0]).result()


def test_logits_that_are_not_finite_end_one_request(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    model = tiny_model()
    marked = 1  # an id that is in no prompt but one
    with torch.no_grad():
        model.model.embed_tokens.weight[marked] = torch.nan
    assert not any(marked in tokens for tokens in (*prompts, *expected))
    batcher = serve(model)
    with pytest.raises(
        GenerationError, match="1 of 7 could not be completed: the logits after 4 tokens are not fin"
    ) as e:
        batcher.generate([*prompts, [5, 6, marked, 7]], max_new_tokens=NEW, progress=False)
    assert e.value.results[:6] == expected
    assert isinstance(e.value.results[6], GenerationError)
    # Pages that held what is not finite are used again, and those of the tokens before it are not shared.
    stem = [*prompts[4][:40]]
    with pytest.raises(GenerationError):
        batcher.submit([*stem, marked], max_new_tokens=NEW).result()
    assert batcher.submit([*stem, 3], max_new_tokens=NEW).result() == alone(tiny_model(), [*stem, 3])
    # Nor while the prompt it is in goes on.
    long = batcher.submit([*stem, marked, *[7] * 200], max_new_tokens=NEW)
    batcher.step()
    assert batcher.submit([*stem, 4], max_new_tokens=NEW).result() == alone(tiny_model(), [*stem, 4])
    with pytest.raises(GenerationError):
        long.result()
    assert batcher.generate(prompts, max_new_tokens=NEW, progress=False) == expected


def test_close_during_work(serve: Serve, prompts: Prompts) -> None:
    model = tiny_model()
    batcher = serve(model, max_num_sequences=2)
    with batcher:
        requests = [batcher.submit(prompt, max_new_tokens=1500) for prompt in prompts]
        next(iter(requests[0]))
        batcher.close()
        for request in requests:
            with pytest.raises(GenerationError, match="the batcher was closed"):
                request.result(timeout=60)
    batcher.close()
    assert not stack_of(model)
    assert not any(one.name == "batcher" for one in threading.enumerate())
    with pytest.raises(GenerationError, match="the batcher is closed .the batcher was closed.. Make another"):
        batcher.submit(prompts[0])


def test_a_closed_batcher_holds_no_pages(serve: Serve, prompts: Prompts) -> None:
    batcher = serve()
    request = batcher.submit(prompts[0], max_new_tokens=2)
    request.result()
    pages = weakref.ref(batcher._stepper.engine.runner.memory.keys[0])
    batcher.close()
    assert pages() is None
    assert len(request.tokens) == 2
    assert batcher.stats().tokens_out == 2


def test_leaving_waits_for_what_was_submitted(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    with serve() as batcher:
        requests = [batcher.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
    assert [request.result() for request in requests] == expected


def test_an_exception_inside_ends_at_once(serve: Serve, prompts: Prompts) -> None:
    with pytest.raises(ZeroDivisionError), serve() as batcher:
        request = batcher.submit(prompts[0], max_new_tokens=1500)
        raise ZeroDivisionError
    with pytest.raises(GenerationError, match="the batcher was closed"):
        request.result()


def test_a_cancelled_request_ends_with_what_it_has(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    batcher = serve()
    request = batcher.submit(prompts[0], max_new_tokens=NEW)
    stream = iter(request)
    first = [next(stream), next(stream)]
    request.cancel()
    assert request.result() == first == expected[0][:2]
    assert list(stream) == []
    assert request.finish_reason == "cancelled"


def test_a_time_out_leaves_the_request_going(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    batcher = serve()
    request = batcher.submit(prompts[0], max_new_tokens=NEW)
    with pytest.raises(TimeoutError, match="It goes on"):
        request.result(timeout=0)
    assert request.result(timeout=60) == expected[0]


def test_captured_steps_are_the_same(serve: Serve, prompts: Prompts, expected: Prompts) -> None:
    """What is captured is run again on buffers with rows of padding, as on a GPU."""
    batcher = serve(max_num_sequences=6)
    runner, captured = batcher._stepper.engine.runner, []

    def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        run()
        captured.append(run)
        return run

    runner.memory.backend = "torch"
    runner.graphs = DecodeGraphs(runner.forward, 6, capture)
    assert batcher.generate(prompts, max_new_tokens=NEW, progress=False) == expected
    rows = {key[0] for key in runner.graphs._made}
    assert rows <= {1, 2, 4, 6}
    assert len(captured) == len(runner.graphs) < batcher.stats().num_steps


def test_a_model_on_two_devices_is_refused() -> None:
    model = tiny_model()
    model.lm_head = nn.Linear(64, 128, bias=False, device="meta")
    with pytest.raises(ValueError, match="its parameters are on cpu and meta"):
        ContinuousBatcher(model)
