"""Requests in, tokens out, one step at a time: joins the scheduler, the runner and the sampler. No threads."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..distributed import ModelMesh
from ..model.serving import WeightsWatch
from .batch import Batch
from .request import Decode, GenerationError, Request
from .runner import Runner
from .sampler import Draw, Drawn, Logprobs, draw
from .scheduler import Scheduler, Work
from .sequence import SequenceState
from .stats import Counts, Stats, percentiles


@dataclass(frozen=True)
class Answer:
    """What the first rank tells the others at the end of a call.

    Attributes:
        result: what the call returns.
        error: what the call raises instead, or None.
        closed: whether nothing can be computed any more.
    """

    result: Any = None
    error: BaseException | None = None
    closed: bool = False


@dataclass(eq=False)
class Engine:
    """All requests that are not done yet, and how they go on.

    Attributes:
        scheduler: what is computed when.
        runner: what computes it.
        mesh: the ranks that hold the model together: the first schedules, and the others `follow`.
        bytes_of_page: how many bytes a page takes on this rank.
        watch: notices that the model's weights have changed.
        why_no_graphs: the reason why steps are not captured in CUDA graphs, or None.
        requests, counts: what goes on, and what was done.
    """

    scheduler: Scheduler
    runner: Runner
    mesh: ModelMesh | None
    bytes_of_page: int
    watch: WeightsWatch
    why_no_graphs: str | None
    requests: dict[SequenceState, Request] = field(default_factory=dict[SequenceState, Request])
    counts: Counts = field(default_factory=Counts)
    _meets: bool = True  # whether the ranks still meet

    def add(self, request: Request) -> None:
        """Take a request in."""
        self.requests[request.sequence] = request
        self.scheduler.add(request.sequence)

    def step(self) -> bool:
        """Compute and sample once; False if there was nothing to do."""
        for sequence, request in list(self.requests.items()):
            if request.cancelled:
                self._end(sequence, "cancelled")
        if self.scheduler.waiting and self.watch.changed():
            # What a prompt that waits would share was computed by other weights.
            self.scheduler.cache.forget(self.scheduler.running)
        works = self.scheduler.schedule()
        if not works:
            assert not self.requests, "requests wait, and none can go on"
            return False
        started = time.perf_counter()
        batch = Batch.of(works)
        self.tell(batch)
        logits, scores = self._compute(batch)
        in_prompts = [one.num_tokens for one in works if one.sequence.num_computed < one.sequence.prompt_length]
        whole = [row for row, work in enumerate(works) if work.num_tokens == work.sequence.remaining]
        rows = [row for row in whole if self.requests[works[row].sequence].options.max_new_tokens]
        sampled = [works[row].sequence for row in rows]
        read = [works[row].sequence for row in sorted({*whole}.difference(rows))]
        # Where nothing is sampled, as of a prompt that goes on, the logits tell whether what was computed is finite.
        rest = sorted(set(range(len(works))).difference(rows))
        drawn = draw(logits[rows] if rest else logits, [*map(self._draw_of, sampled)])
        if None in [one.token for one in drawn] or (rest and not bool(logits[rest].isfinite().all())):
            # It may have got into pages of tokens before it, too, and those may be shared already.
            self.scheduler.cache.forget(self.scheduler.running)
        self._keep(scores, works)
        for sequence, num_tokens in works:
            self.scheduler.cache.advance(sequence, num_tokens)
        self.counts.num_steps += 1
        self.counts.tokens_in += sum(in_prompts)
        self.counts.seconds += time.perf_counter() - started
        for sequence, one in zip(sampled, drawn, strict=True):
            self._take(sequence, one)
        for sequence in read:
            self._end_prompt(sequence)
        return True

    def fail(self, error: BaseException) -> None:
        """End all requests with an error. Nothing can be computed after."""
        requests, self.requests = list(self.requests.values()), {}
        for request in requests:
            request.end("error", error)
        self.scheduler.clear()

    def stats(self) -> Stats:
        """The numbers of the work so far."""
        scheduler, pages, counts = self.scheduler, self.scheduler.cache.pages, self.counts
        graphs = self.runner.graphs
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=counts.finished,
            tokens_in=counts.tokens_in,
            tokens_out=counts.tokens_out,
            tokens_in_per_second=counts.per_second(counts.tokens_in),
            tokens_out_per_second=counts.per_second(counts.tokens_out),
            num_steps=counts.num_steps,
            pages_used=pages.num_used,
            most_pages_used=scheduler.max_pages_used,
            num_pages=pages.num_pages,
            kv_bytes=pages.num_pages * self.bytes_of_page,
            prefix_tokens=scheduler.num_shared,
            preemptions=scheduler.num_preemptions,
            cuda_graphs=f"none: {self.why_no_graphs or 'closed'}" if graphs is None else f"{len(graphs)} captured",
            time_to_first_token=percentiles(tuple(counts.first)),
            time_between_tokens=percentiles(tuple(counts.between)),
        )

    def tell(self, said: Batch | Answer | None) -> None:
        """Let the other ranks, which `follow`, compute a batch, or return an answer; or, with None, go on waiting."""
        if self.mesh is not None and self._meets:
            self.mesh.broadcast_from_first(said)

    def follow(self) -> Answer:
        """On another rank than the first: compute what the first says, until it gives an answer."""
        assert self.mesh is not None
        while True:
            said = self.mesh.broadcast_from_first(None)
            if isinstance(said, Answer):
                return said
            if isinstance(said, Batch):
                self._compute(said)

    def _compute(self, batch: Batch) -> tuple[Tensor, list[Logprobs]]:
        # If it fails on one rank, the others wait within it: nothing more can be said to them.
        met, self._meets = self._meets, False
        found = self.runner.run(batch)
        self._meets = met
        return found

    def _keep(self, scores: list[Logprobs], works: list[Work]) -> None:
        """Give requests the log-probabilities of their prompts' tokens that were computed in this step."""
        left = iter(scores)
        for sequence, num_tokens in works:
            scored = sequence.scored
            # Of one that gave its pages back they are computed again.
            for n in scored.within(sequence.num_computed, sequence.num_computed + num_tokens):
                place = n - scored.start
                self.requests[sequence].prompt_logprobs[place : place + 1] = [next(left)]

    def _draw_of(self, sequence: SequenceState) -> Draw:
        request = self.requests[sequence]
        return Draw(request.options, request.completion, sequence.tokens, len(request.tokens))

    def _take(self, sequence: SequenceState, drawn: Drawn) -> None:
        request = self.requests[sequence]
        if drawn.token is None:
            message = (
                f"the logits after {len(sequence.tokens)} tokens are not finite: a weight or an activation is not."
            )
            self._end(sequence, "error", GenerationError(message, list(request.tokens)))
            return
        try:
            reason = self._reason_to_stop(request, drawn.token)
        except Exception as failed:
            error = GenerationError(f"the tokenizer failed on the new token: {failed!r}", list(request.tokens))
            self._end(sequence, "error", error)
            return
        sequence.tokens.append(drawn.token)
        if reason is not None:
            self._forget(sequence)
        request.push(drawn, reason)
        self.counts.tokens_out += 1
        if len(request.times) > 1:
            self.counts.between.append(request.times[-1] - request.times[-2])
        else:
            self.counts.first.append(request.times[-1] - request.submitted)

    def _end_prompt(self, sequence: SequenceState) -> None:
        """End a request that asked for nothing but log-probabilities of its prompt."""
        if all(math.isfinite(one.logprob) for one in self.requests[sequence].prompt_logprobs):
            self._end(sequence, "length")
        else:
            message = "the logits within the prompt are not finite: a weight or an activation is not."
            self._end(sequence, "error", GenerationError(message))

    def _reason_to_stop(self, request: Request, token: int) -> str | None:
        options, decode = request.options, request.decode
        if token in options.stop_token_ids:
            return "stop"
        if decode is not None:
            tokens = [*request.sequence.tokens, token]
            if _ends_a_text(options.stop_strings, tokens, len(request.tokens) + 1, decode):
                return "stop"
        return "length" if len(request.tokens) + 1 == options.max_new_tokens else None

    def _end(self, sequence: SequenceState, reason: str, error: BaseException | None = None) -> None:
        request = self.requests[sequence]
        self._forget(sequence)
        request.end(reason, error)

    def _forget(self, sequence: SequenceState) -> None:
        del self.requests[sequence]
        self.scheduler.remove(sequence)
        self.counts.finished += 1


def _ends_a_text(strings: tuple[str, ...], tokens: list[int], num_new: int, decode: Decode) -> bool:
    """Whether one of the strings ends in the text of the new tokens. It may begin before them, as in transformers."""
    # As a rule a token is a byte of text at least; those that are none must not push the beginning out of sight.
    longest = count = max(len(one.encode()) for one in strings) + 1
    while len(text := decode(tokens[-count:])) < longest and count < len(tokens):
        count *= 2
    old = tokens[-count:][:-num_new] if num_new < count else []
    begin = len(decode(old)) if old else 0
    return any(one in text[max(begin - len(one) + 1, 0) :] for one in strings)
