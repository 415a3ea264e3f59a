"""Continuous batching: throughput beside the peers, waiting behind a long prompt, shared prefixes, memory of keys.

    python -m benchmarks.batching [--only NAME] [--repeats N]

The mixed workload is 32 requests of 16 to 512 prompt tokens and 16 to 256 new ones, all submitted at once, on a random
model of 8 layers and 491 M parameters. Each contender holds its model in a process of its own, and they run in turn.
vLLM takes part where GPTOSS_OPT_VLLM_PYTHON names the Python of an environment that has it. On a GPU the shape is the
20b's.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contenders import (
    VLLM_PYTHON,
    Ask,
    Checkpoints,
    Outcome,
    Vllm,
    Worker,
    generate_batch,
    ours,
    static,
)
from benchmarks.harness import device, record, table
from gptoss_opt import ContinuousBatcher, load, with_flash_attention, with_mxfp4_experts
from gptoss_opt.testing import SIZES, random_checkpoint

PACKED, DENSE = "ours, packed experts", "ours, dense experts"
VLLM, GENERATE_BATCH = "vLLM", "transformers generate_batch"
STATIC = ("transformers generate, all in one batch", "transformers generate, batches of 8")
ASKED = {GENERATE_BATCH: 5.0, "the best static generate": 3.5, VLLM: 1.2}
SHARING_ASKED = 1.5
SLOW = {GENERATE_BATCH, *STATIC}
"""Run once: a turn of theirs takes minutes."""


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


def checkpoints(folder: Path, size: str) -> Checkpoints:
    """A random checkpoint, as released and dequantised."""
    packed = random_checkpoint(folder / "packed", size, progress=True)
    model = load(packed)
    model.save_pretrained(folder / "dense")
    return Checkpoints(packed, folder / "dense")


def regret(model: Any, asks: Sequence[Ask], outputs: Sequence[Sequence[int]], count: int = 6) -> float:
    """How much less likely than the likeliest the tokens of some sequences are, on average, to a model in float32.

    In nats. Greedy tokens of an exact computation have none; rounding makes ties fall otherwise.
    """
    found = []
    for ask, made in list(zip(asks, outputs, strict=True))[:count]:
        assert len(made) == ask.new_tokens
        tokens = torch.tensor([[*ask.prompt, *made]], device=model.device)
        with torch.no_grad():
            logits = model(tokens, logits_to_keep=len(made) + 1).logits[0, :-1].float()
        chosen = logits.gather(-1, tokens[0, -len(made) :, None])[:, 0]
        found.append(logits.amax(-1) - chosen)
    return float(torch.cat(found).mean())


def verify(dense: Path, asks: Sequence[Ask], outcomes: dict[str, Outcome]) -> dict[str, float]:
    """Each contender's regret. Raises if ours is more than twice that of transformers, in the same bfloat16."""
    judge = load(dense, with_flash_attention(), dtype=torch.float32, device=device())
    found = {name: regret(judge, asks, outcome.outputs) for name, outcome in outcomes.items()}
    other = regret(
        judge, asks, [[(t + 1) % judge.config.vocab_size for t in made] for made in outcomes[PACKED].outputs]
    )
    allowed = 2 * max(found[name] for name in (*STATIC, GENERATE_BATCH) if name in found)
    assert other > 10 * allowed, "the measure does not tell other tokens apart"
    for name in (PACKED, DENSE):
        assert found[name] <= allowed, f"{name}: regret of {found[name]}, allowed {allowed}"
    return found


def throughput(made: Checkpoints, asks: list[Ask], repeats: int, threads: int) -> dict[str, Any]:
    """Useful tokens per second of all contenders, in turn; on a GPU, which does not hold all, one after the other."""
    batch, on_gpu = len(asks), device().type == "cuda"
    contenders: dict[str, Callable[[], Any]] = {
        PACKED: partial(Worker, partial(ours, packed=True), made, threads),
        DENSE: partial(Worker, partial(ours, packed=False), made, threads),
        GENERATE_BATCH: partial(Worker, generate_batch, made, threads),
        **{
            name: partial(Worker, partial(static, batch=size), made, threads)
            for name, size in zip(STATIC, (batch, 8), strict=True)
        },
    }
    absent = {}
    if os.environ.get(VLLM_PYTHON) and not on_gpu:
        contenders[VLLM] = partial(Vllm, made, threads)
    else:
        absent[VLLM] = "its CPU build is for CPUs" if on_gpu else f"{VLLM_PYTHON} is not set"
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
    warm = [Ask(one.prompt[:16], 4) for one in asks[:4]]
    working: dict[str, Any] = {}
    turns = [(turn, name) for turn in range(repeats) for name in contenders if not (turn and name in SLOW)]
    for _, name in tqdm(turns, desc="throughput", unit="run"):
        if name not in working:
            working[name] = contenders[name]()
            working[name].run(warm)
        outcomes[name].append(working[name].run(asks))
        if on_gpu:
            working.pop(name).close()
    for worker in working.values():
        worker.close()
    regrets = verify(made.dense, asks, {name: some[0] for name, some in outcomes.items()})
    num_tokens = sum(one.new_tokens for one in asks)
    rates = {name: num_tokens / statistics.median(one.seconds for one in some) for name, some in outcomes.items()}
    rates["the best static generate"] = max(rates[name] for name in STATIC)
    return {
        "case": f"mixed workload of {batch}",
        "tokens": {"prompts": sum(len(one.prompt) for one in asks), "new": num_tokens},
        "seconds": {name: [round(one.seconds, 3) for one in some] for name, some in outcomes.items()},
        "tokens/s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {name: round(rates[PACKED] / rates[name], 2) for name in ASKED if name in rates},
        "asked": ASKED,
        "regret": {name: round(value, 5) for name, value in regrets.items()},
        "absent": absent,
    }


def prefixes(made: Checkpoints, asks: list[Ask], repeats: int, threads: int) -> dict[str, Any]:
    """The same requests with and without using each other's pages."""
    both = {
        name: Worker(partial(ours, packed=True, share_prefixes=share), made, threads)
        for name, share in (("sharing", True), ("not sharing", False))
    }
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(repeats + 1):
        outcomes = {name: worker.run(asks) for name, worker in both.items()}
        for name, outcome in outcomes.items():
            if turn:
                seconds[name].append(outcome.seconds)
    for worker in both.values():
        worker.close()
    judge = load(made.dense, with_flash_attention(), dtype=torch.float32, device=device())
    regrets = {name: regret(judge, asks, outcome.outputs) for name, outcome in outcomes.items()}
    assert regrets["sharing"] <= 2 * regrets["not sharing"] + 1e-3, regrets
    ratios = [a / b for a, b in zip(seconds["not sharing"], seconds["sharing"], strict=True)]
    return {
        "case": f"{len(asks)} prompts with 256 tokens in common",
        "seconds": {name: round(statistics.median(some), 3) for name, some in seconds.items()},
        "ratio": {"not sharing": round(statistics.median(ratios), 2)},
        "asked": {"not sharing": SHARING_ASKED},
        "regret": {name: round(value, 5) for name, value in regrets.items()},
    }


def waiting(made: Checkpoints, long: int, threads: int) -> dict[str, Any]:
    """The time to the first token of a short prompt that arrives while a long one is computed."""
    torch.set_num_threads(threads)
    model = load(made.packed, with_mxfp4_experts(), with_flash_attention(), device=device())
    draw = random.Random(0)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(length)] for length in (long, 32)]
    points = {}
    for budget in (256, 512, 2048, 2 * long):
        batcher = ContinuousBatcher(model, max_batch_tokens=budget, kv_memory=1 << 30, share_prefixes=False)
        with batcher:
            first = batcher.submit(prompts[0], max_new_tokens=1, eos_token_id=[])
            time.sleep(0.05)  # its first chunk is under way
            second = batcher.submit(prompts[1], max_new_tokens=1, eos_token_id=[])
            second.result(), first.result()
        times = [one.times[0] - one.submitted for one in (first, second)]
        points[budget] = {"long": round(times[0], 3), "short": round(times[1], 3)}
    unchunked = points[2 * long]["short"]
    assert points[512]["short"] < unchunked / 4
    return {"case": f"32 tokens behind {long}", "seconds to the first token, by max_batch_tokens": points}


def memory(made: Checkpoints) -> dict[str, Any]:
    """Bytes of keys and values that a sequence takes, beside the formula."""
    model = load(made.packed, with_mxfp4_experts(), with_flash_attention(), device=device())
    config, points = model.config, {}
    per_layer = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    full = config.layer_types.count("full_attention")
    sliding = len(config.layer_types) - full
    for length in (512, 2048, 8192):
        batcher = ContinuousBatcher(model, kv_memory=1 << 30, page_size=16)
        request = batcher.submit([n % 1000 for n in range(length - 1)], max_new_tokens=8, eos_token_id=[])
        while len(request.tokens) < 2:
            batcher.step()
        stats = batcher.stats()
        used = stats.pages_used * stats.kv_bytes // stats.num_pages
        formula = per_layer * (full * length + sliding * min(length, config.sliding_window))
        naive = per_layer * (full + sliding) * length
        page = 16 * per_layer * max(full, sliding)
        # Pages are whole, and a window lies on one more than it fills.
        assert 0 <= used - formula <= 3 * page, (used, formula)
        points[length] = {"used": used, "formula": formula, "without windows": naive, "share": round(used / naive, 3)}
        batcher.close()
    return {"case": "bytes of keys and values of one sequence", "by length": points}


def concurrency(made: Checkpoints, threads: int) -> dict[str, Any]:
    """Throughput against how many are generated at once: 64 prompts of 64 tokens, 64 new ones each."""
    draw = random.Random(0)
    asks = [Ask([draw.randrange(32000) for _ in range(64)], 64) for _ in range(64)]
    points = {}
    for number in tqdm((1, 2, 4, 8, 16, 32, 64), desc="concurrency", unit="run"):
        worker = Worker(partial(ours, packed=True, max_num_sequences=number), made, threads)
        worker.run(asks[:2])
        some = asks[: max(4, min(2 * number, len(asks)))]
        outcome = worker.run(some)
        points[number] = round(sum(one.new_tokens for one in some) / outcome.seconds, 1)
        worker.close()
    return {"case": "tokens/s by max_num_sequences", "tokens/s": points}


def show(points: list[dict[str, Any]]) -> str:
    """The points as tables."""
    rows = []
    for point in points:
        for name, ratio in point.get("ratio", {}).items():
            rows.append((point["case"], f"against {name}", f"{ratio:.2f}x", f">= {point['asked'][name]:g}x"))
        for name, rate in point.get("tokens/s", {}).items():
            rows.append((point["case"], str(name), f"{rate:.1f} tokens/s", ""))
        rows += [(point["case"], name, "absent", why) for name, why in point.get("absent", {}).items()]
        for key in ("seconds to the first token, by max_batch_tokens", "by length"):
            rows += [(point["case"], f"{key}: {at}", str(value), "") for at, value in point.get(key, {}).items()]
    return table(("case", "what", "found", "asked"), rows)


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    on_gpu = device().type == "cuda"
    size = "20b" if on_gpu else "medium"
    vocabulary = SIZES[size].bos
    draw = random.Random(0)

    def many(count: int) -> list[Ask]:
        return [Ask([draw.randrange(vocabulary) for _ in range(1024)], 1024) for _ in range(count)]

    with tempfile.TemporaryDirectory(prefix="batching-") as scratch:
        made = checkpoints(Path(scratch), size)
        cases = {
            "memory": lambda: memory(made),
            "waiting": lambda: waiting(made, 8192, args.threads),
            "prefixes": lambda: prefixes(made, sharing(vocabulary), args.repeats, args.threads),
            "concurrency": lambda: concurrency(made, args.threads),
            "mixed": lambda: throughput(made, mixed(vocabulary), args.repeats, args.threads),
        }
        if on_gpu:
            cases["64 requests"] = lambda: throughput(made, many(64), 1, args.threads)
            cases["256 requests"] = lambda: throughput(made, many(256), 1, args.threads)
        points = [run() for name, run in cases.items() if args.only is None or args.only in name]
    print(show(points))
    if args.only is None:
        print(f"written to {record('batching', points, 'python -m benchmarks.batching')}")


if __name__ == "__main__":
    main()
