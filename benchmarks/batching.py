"""Continuous batching: throughput beside the peers, waiting behind a long prompt, shared prefixes, memory of keys.

The mixed workload is 32 requests of 16 to 512 prompt tokens and 16 to 256 new ones, all submitted at once, on a random
model of 8 layers and 491 M parameters. Each contender holds its model in a process of its own, and they run in turn.
vLLM takes part where GPTOSS_OPT_VLLM_PYTHON names the Python of an environment that has it. On a GPU the shape is the
20b's.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.case import Case, Point, Settings
from benchmarks.contenders import (
    VLLM_PYTHON,
    Ask,
    Checkpoints,
    Contender,
    checkpoints,
    generate_batch,
    ours,
    static,
    vllm,
)
from benchmarks.harness import device, median_ratio
from gptoss_opt import ContinuousBatcher, load, with_flash_attention, with_mxfp4_experts
from gptoss_opt.testing import SIZES

PACKED, DENSE = "ours, packed experts", "ours, dense experts"
VLLM, GENERATE_BATCH = "vLLM", "transformers generate_batch"
STATIC = ("transformers generate, all in one batch", "transformers generate, batches of 8")
BEST_STATIC = "the best static generate"
ASKED = {GENERATE_BATCH: 5.0, BEST_STATIC: 3.5, VLLM: 1.2}
SHARING_ASKED = 1.5
SLOW = {GENERATE_BATCH, *STATIC}
"""Contenders that run once: a turn of theirs takes minutes."""
WAITING, LENGTHS = "seconds to the first token, by max_batch_tokens", "by length"
PAGE_SIZE = 16

Contenders = Mapping[str, Contender]
"""Who takes part, by name."""


def mixed(vocabulary: int, count: int = 32, seed: int = 0) -> list[Ask]:
    """Prompts of 16 to 512 tokens, 16 to 256 new ones each."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocabulary) for _ in range(draw.randint(16, 512))] for _ in range(count)]
    return [Ask(prompt, draw.randint(16, 256)) for prompt in prompts]


def sharing(vocabulary: int, count: int = 32, seed: int = 0) -> list[Ask]:
    """A prefix of 256 tokens, and 16 to 64 more of each one's own; 16 to 32 new ones."""
    draw = random.Random(seed)
    prefix = [draw.randrange(vocabulary) for _ in range(256)]
    ends = [[draw.randrange(vocabulary) for _ in range(draw.randint(16, 64))] for _ in range(count)]
    return [Ask([*prefix, *end], draw.randint(16, 32)) for end in ends]


def of_lengths(vocabulary: int, lengths: Sequence[int], new_tokens: int) -> list[Ask]:
    """Prompts of these lengths, and the same number of new tokens for each."""
    draw = random.Random(0)
    return [Ask([draw.randrange(vocabulary) for _ in range(length)], new_tokens) for length in lengths]


def judge_of(made: Checkpoints) -> Any:
    """The same weights in float32."""
    return load(made.dense, with_flash_attention(), dtype=torch.float32, device=device())


def regret(judge: Any, asks: Sequence[Ask], outputs: Sequence[Sequence[int]], count: int = 6) -> float:
    """How much less likely than the likeliest the tokens of some sequences are, on average, to a model in float32.

    In nats. Greedy tokens of an exact computation have none; rounding makes ties fall otherwise.
    """
    found = []
    for ask, made in list(zip(asks, outputs, strict=True))[:count]:
        assert len(made) == ask.new_tokens
        tokens = torch.tensor([[*ask.prompt, *made]], device=judge.device)
        with torch.no_grad():
            logits = judge(tokens, logits_to_keep=len(made) + 1).logits[0, :-1].float()
        chosen = logits.gather(-1, tokens[0, -len(made) :, None])[:, 0]
        found.append(logits.amax(-1) - chosen)
    return float(torch.cat(found).mean())


@dataclass(frozen=True)
class Serving(Case):
    """What all cases share: the checkpoints, and a table of ratios, rates, who is absent, and figures by a number."""

    folder: Path
    size: str
    columns = """
        case   | what   | found   | asked
        {case} | {what} | {found} | >= {asked:g}x
    """

    def checkpoints(self) -> Checkpoints:
        """The weights."""
        return checkpoints(self.folder, self.size)

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for point in points:
            for name, ratio in point.get("ratio", {}).items():
                yield {"what": f"against {name}", "found": f"{ratio:.2f}x", "asked": point["asked"][name]}
            for name, rate in point.get("tokens/s", {}).items():
                yield {"what": name, "found": f"{rate:.1f} tokens/s"}
            for name, why in point.get("absent", {}).items():
                yield {"what": name, "found": f"absent: {why}"}
            for key in (WAITING, LENGTHS):
                yield from ({"what": f"{key}: {at}", "found": value} for at, value in point.get(key, {}).items())


@dataclass(frozen=True)
class Throughput(Serving):
    """Useful tokens per second of all contenders, in turn; on a GPU, which does not hold all, one after the other.

    Attributes:
        num_turns: how many turns to take, whatever the settings say.
    """

    asks: list[Ask]
    num_turns: int | None = None

    def setup(self) -> Contenders:
        made = self.checkpoints()
        contenders = {
            PACKED: Contender(ours, made, packed=True),
            DENSE: Contender(ours, made, packed=False),
            GENERATE_BATCH: Contender(generate_batch, made),
            STATIC[0]: Contender(static, made, batch=len(self.asks)),
            STATIC[1]: Contender(static, made, batch=8),
        }
        return contenders if self.absent() else contenders | {VLLM: Contender(vllm, made)}

    def absent(self) -> dict[str, str]:
        """Who does not take part, and why."""
        if device().type == "cuda":
            return {VLLM: "its CPU build is for CPUs"}
        return {} if os.environ.get(VLLM_PYTHON) else {VLLM: f"{VLLM_PYTHON} is not set"}

    def run(self, made: Contenders, repeats: int) -> list[Point]:
        turns = [(turn, name) for turn in range(self.num_turns or repeats) for name in made]
        for _, name in tqdm([at for at in turns if not (at[0] and at[1] in SLOW)], desc="throughput", unit="run"):
            made[name].run(self.asks, warm=[Ask(one.prompt[:16], 4) for one in self.asks[:4]])
            if device().type == "cuda":
                made[name].close()
        num_tokens, seconds = sum(one.new_tokens for one in self.asks), finish(made)
        rates = {name: num_tokens / statistics.median(some) for name, some in seconds.items()}
        rates[BEST_STATIC] = max(rates[name] for name in STATIC)
        point = {
            "tokens": {"prompts": sum(len(one.prompt) for one in self.asks), "new": num_tokens},
            "seconds": {name: [round(one, 3) for one in some] for name, some in seconds.items()},
            "tokens/s": {name: round(rate, 1) for name, rate in rates.items()},
            "ratio": {name: round(rates[PACKED] / rates[name], 2) for name in ASKED if name in rates},
            "asked": ASKED,
            "absent": self.absent(),
        }
        return [point]

    def verify(self, made: Contenders, points: list[Point]) -> None:
        """Ours has at most twice the regret of transformers in the same bfloat16, and other tokens have far more."""
        judge = judge_of(self.checkpoints())
        outputs = {name: one.outcomes[0].outputs for name, one in made.items()}
        regrets = {name: regret(judge, self.asks, some) for name, some in outputs.items()}
        others = [[(token + 1) % judge.config.vocab_size for token in some] for some in outputs[PACKED]]
        allowed = 2 * max(regrets[name] for name in SLOW)
        assert regret(judge, self.asks, others) > 10 * allowed, "the measure does not tell other tokens apart"
        for name in (PACKED, DENSE):
            assert regrets[name] <= allowed, f"{name}: regret of {regrets[name]}, allowed {allowed}"
        points[0]["regret"] = {name: round(value, 5) for name, value in regrets.items()}


@dataclass(frozen=True)
class Prefixes(Serving):
    """The same requests with and without using each other's pages."""

    asks: list[Ask]

    def setup(self) -> Contenders:
        made, both = self.checkpoints(), {"sharing": True, "not sharing": False}
        return {name: Contender(ours, made, packed=True, share_prefixes=share) for name, share in both.items()}

    def run(self, made: Contenders, repeats: int) -> list[Point]:
        for one in [*made.values()] * repeats:
            one.run(self.asks, warm=self.asks)
        seconds = finish(made)
        ratio = round(median_ratio(seconds["not sharing"], seconds["sharing"]), 2)
        medians = {name: round(statistics.median(some), 3) for name, some in seconds.items()}
        return [{"seconds": medians, "ratio": {"not sharing": ratio}, "asked": {"not sharing": SHARING_ASKED}}]

    def verify(self, made: Contenders, points: list[Point]) -> None:
        """Sharing has no more regret than rounding explains."""
        judge = judge_of(self.checkpoints())
        regrets = {name: regret(judge, self.asks, one.outcomes[-1].outputs) for name, one in made.items()}
        assert regrets["sharing"] <= 2 * regrets["not sharing"] + 1e-3, regrets
        points[0]["regret"] = {name: round(value, 5) for name, value in regrets.items()}


def finish(contenders: Contenders) -> dict[str, list[float]]:
    """End the processes, and return how long the runs of each took."""
    for contender in contenders.values():
        contender.close()
    return {name: [one.seconds for one in contender.outcomes] for name, contender in contenders.items()}


@dataclass(frozen=True)
class Concurrency(Serving):
    """Throughput against how many sequences are generated at once, each number once."""

    asks: list[Ask]
    numbers: tuple[int, ...]

    def some(self, number: int) -> list[Ask]:
        """The requests for a number, which are enough for two rounds."""
        return self.asks[: max(4, min(2 * number, len(self.asks)))]

    def setup(self) -> dict[int, Contender]:
        made = self.checkpoints()
        return {number: Contender(ours, made, packed=True, max_num_sequences=number) for number in self.numbers}

    def run(self, made: dict[int, Contender], repeats: int) -> list[Point]:
        rates = {}
        for number, one in tqdm(made.items(), desc="concurrency", unit="run"):
            one.run(self.some(number), warm=self.asks[:2])
            one.close()
            rates[number] = round(sum(ask.new_tokens for ask in self.some(number)) / one.outcomes[0].seconds, 1)
        return [{"tokens/s": rates}]

    def verify(self, made: dict[int, Contender], points: list[Point]) -> None:
        """Every request got the tokens that it asked for."""
        for number, one in made.items():
            lengths = [len(output) for output in one.outcomes[0].outputs]
            assert lengths == [ask.new_tokens for ask in self.some(number)], (number, lengths)


@dataclass(frozen=True)
class InProcess(Serving):
    """A case that looks into a batcher, in this process."""

    def setup(self) -> Any:
        return load(self.checkpoints().packed, with_mxfp4_experts(), with_flash_attention(), device=device())


@dataclass(frozen=True)
class Waiting(InProcess):
    """The time to the first token of a short prompt that arrives while a long one is computed."""

    num_long: int

    def run(self, made: Any, repeats: int) -> list[Point]:
        prompts = [one.prompt for one in of_lengths(made.config.vocab_size, (self.num_long, 32), 1)]
        points = {}
        # The last budget takes the long prompt whole.
        for budget in (256, 512, 2048, 2 * self.num_long):
            batcher = ContinuousBatcher(made, max_batch_tokens=budget, kv_memory=1 << 30, share_prefixes=False)
            with batcher:
                first = batcher.submit(prompts[0], max_new_tokens=1, eos_token_id=[])
                time.sleep(0.05)  # its first chunk is under way
                second = batcher.submit(prompts[1], max_new_tokens=1, eos_token_id=[])
                second.result(), first.result()
            times = [round(one.times[0] - one.submitted, 3) for one in (first, second)]
            points[budget] = dict(zip(("long", "short"), times, strict=True))
        return [{WAITING: points}]

    def verify(self, made: Any, points: list[Point]) -> None:
        """The short prompt waits for a chunk, and not for all of the long one."""
        waits = points[0][WAITING]
        assert waits[512]["short"] < waits[2 * self.num_long]["short"] / 4, waits


@dataclass(frozen=True)
class Memory(InProcess):
    """Bytes of keys and values that a sequence takes, beside the formula."""

    lengths: tuple[int, ...]

    def run(self, made: Any, repeats: int) -> list[Point]:
        full, sliding, per_layer = kinds_of_layers(made)
        points = {}
        for length in self.lengths:
            with closing(ContinuousBatcher(made, kv_memory=1 << 30, page_size=PAGE_SIZE)) as batcher:
                request = batcher.submit([n % 1000 for n in range(length - 1)], max_new_tokens=8, eos_token_id=[])
                while len(request.tokens) < 2:
                    batcher.step()
                stats = batcher.stats()
            used = stats.pages_used * stats.kv_bytes // stats.num_pages
            formula = per_layer * (full * length + sliding * min(length, made.config.sliding_window))
            naive = per_layer * (full + sliding) * length
            points[length] = {
                "used": used,
                "formula": formula,
                "without windows": naive,
                "share": round(used / naive, 3),
            }
        return [{LENGTHS: points}]

    def verify(self, made: Any, points: list[Point]) -> None:
        """Pages are whole, and a window lies on one more than it fills."""
        full, sliding, per_layer = kinds_of_layers(made)
        for found in points[0][LENGTHS].values():
            assert 0 <= found["used"] - found["formula"] <= 3 * PAGE_SIZE * per_layer * max(full, sliding), found


def kinds_of_layers(model: Any) -> tuple[int, int, int]:
    """How many layers see everything, how many a window, and the bytes of a token's key and value in one of them."""
    config = model.config
    full = config.layer_types.count("full_attention")
    return full, len(config.layer_types) - full, 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def cases(settings: Settings, folder: Path) -> list[Case]:
    """All cases; on a GPU also 64 and 256 requests of 1,024 tokens in and out."""
    size = "20b" if device().type == "cuda" else "medium"
    vocabulary, at = SIZES[size].bos, (folder, size)
    numbers, asks = (1, 2, 4, 8, 16, 32, 64), of_lengths(32000, [64] * 64, 64)
    found: list[Case] = [
        Memory("bytes of keys and values of one sequence", *at, lengths=(512, 2048, 8192)),
        Waiting("32 tokens behind 8192", *at, num_long=8192),
        Prefixes("32 prompts with 256 tokens in common", *at, asks=sharing(vocabulary)),
        Concurrency("tokens/s by max_num_sequences", *at, asks=asks, numbers=numbers),
        Throughput("mixed workload of 32", *at, asks=mixed(vocabulary)),
    ]
    if size == "20b":
        long = of_lengths(vocabulary, [1024] * 320, 1024)
        both = long[:64], long[64:]
        found += [Throughput(f"mixed workload of {len(some)}", *at, asks=some, num_turns=1) for some in both]
    return found


SETTINGS = Settings()
