"""Attention with sinks, beside transformers' eager attention, in the head geometry of gpt-oss-20b.

    python -m benchmarks.attention [--only NAME] [--repeats N] [--threads N]

Each case is verified (output and gradients against the peer's, in the same dtype) before it is timed; peer and ours run
in turn. The peer gets its mask ready made. On a CUDA device the cases are longer, and flex_attention is a peer as well.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from benchmarks.harness import alternate, device, gemm_rate, median_ratio, peak_memory, record, table, threads
from gptoss_opt import undo, with_flash_attention
from gptoss_opt.kernels.attention import attention

HEADS, KV_HEADS, DIM = 64, 8, 64
WINDOW = 128
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One point: shapes, and the ratios to eager that are asked for (None: reported only)."""

    name: str
    dtype: torch.dtype
    num_queries: int
    num_keys: int
    window: int | None = None
    forward: float | None = None
    both: float | None = None


CPU_CASES = (
    Case("full 2048 float32", F32, 2048, 2048, None, 10, 5),
    Case("full 2048 bfloat16", BF16, 2048, 2048, None, 4, 3),
    Case("sliding 4096 float32", F32, 4096, 4096, WINDOW, 20, 10),
    Case("sliding 4096 bfloat16", BF16, 4096, 4096, WINDOW, 20, 10),
    Case("decode 4096 float32", F32, 1, 4096, None, 4),
    Case("decode 4096 bfloat16", BF16, 1, 4096, None, 4),
    Case("decode 4096 sliding bfloat16", BF16, 1, 4096, WINDOW),
)
GPU_CASES = tuple(
    Case(f"{'sliding' if window else 'full'} {length} bfloat16", BF16, length, length, window)
    for length in (2048, 4096, 8192, 16384, 32768)
    for window in (None, WINDOW)
)
# Eager scores of 32768 keys fill a card: beyond this, flex_attention is the only peer.
LONGEST_EAGER = 8192
PREFILL_LENGTHS = (2048, 8192)
MEMORY_LENGTHS, MEMORY_RATIO = (4096, 8192), 2.2


def setup(case: Case) -> list[Tensor]:
    """Random q, k, v and sinks."""
    torch.manual_seed(0)
    shapes = ((HEADS, case.num_queries), (KV_HEADS, case.num_keys), (KV_HEADS, case.num_keys))
    tensors = [torch.randn(1, heads, length, DIM) for heads, length in shapes]
    return [x.to(device(), case.dtype).requires_grad_() for x in (*tensors, torch.randn(HEADS))]


def ours(case: Case) -> Callable[..., Tensor]:
    """Our attention, [1, T, H, D]."""
    return lambda q, k, v, sinks: attention(q, k, v, sinks, scale=DIM**-0.5, window=case.window).transpose(1, 2)


def eager(case: Case) -> Callable[..., Tensor]:
    """transformers' eager attention, [1, T, H, D], its mask ready made."""
    slot = torch.arange(case.num_queries, device=device())[:, None] + case.num_keys - case.num_queries
    key = torch.arange(case.num_keys, device=device())
    seen = (key <= slot) & (key > slot - (case.window or case.num_keys))
    low = torch.finfo(case.dtype).min
    mask = torch.zeros(seen.shape, dtype=case.dtype, device=device()).masked_fill_(~seen, low)[None, None]

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        module: Any = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, sinks=sinks, training=False)
        return eager_attention_forward(module, q, k, v, mask, DIM**-0.5)[0]

    return run


def flex(case: Case) -> Callable[..., Tensor]:
    """torch's flex_attention, compiled, with the sink put in through its log-sum-exp, [1, T, H, D]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - (case.window or case.num_keys))

    mask = create_block_mask(seen, None, None, case.num_queries, case.num_keys, device=device())
    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = compiled(q, k, v, block_mask=mask, scale=DIM**-0.5, enable_gqa=True, return_lse=True)
        weight = torch.sigmoid(lse - sinks.float()[None, :, None])
        return (out * weight[..., None].to(out.dtype)).transpose(1, 2)

    return run


def differentiate(run: Callable[..., Tensor], tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    out = run(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, d_out)]


def verify(case: Case, name: str, a: list[Tensor], b: list[Tensor]) -> None:
    """Output and gradients agree as far as the dtype allows."""
    allowed = 64 * torch.finfo(case.dtype).eps
    for what, x, y in zip(("out", "dq", "dk", "dv", "dsinks"), a, b, strict=False):
        error = float((x.double() - y.double()).norm() / y.double().norm())
        if not error <= allowed:
            raise AssertionError(f"{case.name}: {what} of {name} differs by {error:.2g}, allowed {allowed:.2g}")


def flops(case: Case) -> float:
    """Operations of the forward on the (query, key) pairs that see each other; the backward does 2.5 times as many."""
    keys = torch.arange(case.num_queries) + case.num_keys - case.num_queries + 1
    pairs = keys.clamp(max=case.window or case.num_keys).sum().item()
    return 4.0 * HEADS * DIM * pairs


def run(case: Case, repeats: int, rates: dict[torch.dtype, float]) -> dict[str, Any]:
    """One verified point."""
    tensors = setup(case)
    peers = {"eager": eager} if case.num_keys <= LONGEST_EAGER else {}
    if device().type == "cuda":
        peers["flex_attention"] = flex
    runs = {"ours": ours(case), **{name: peer(case) for name, peer in peers.items()}}
    d_out = torch.randn(1, case.num_queries, HEADS, DIM, device=device(), dtype=case.dtype)
    expected = differentiate(runs["ours"], tensors, d_out)
    for name in peers:
        verify(case, name, differentiate(runs[name], tensors, d_out), expected)
    point: dict[str, Any] = {"case": case.name, "verified against": list(peers)}
    passes: dict[str, Callable[[Callable[..., Tensor]], object]] = {
        "forward": torch.no_grad()(lambda f: f(*tensors)),
        "both": lambda f: differentiate(f, tensors, d_out),
    }
    if case.num_queries == 1:
        del passes["both"]
    for kind, once in passes.items():
        times = alternate({name: partial(once, f) for name, f in runs.items()}, repeats)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        ratios = {name: round(median_ratio(times[name], times["ours"]), 2) for name in peers}
        done = flops(case) * (3.5 if kind == "both" else 1)
        point[kind] = {
            "seconds": {name: round(taken, 6) for name, taken in median.items()},
            "ratio": ratios,
            "asked": getattr(case, kind),
            "share of GEMM rate": round(done / median["ours"] / rates[case.dtype], 3),
        }
    return point


def one_pass(case: Case) -> Callable[[], object]:
    """Forward and backward of ours, ready to run."""
    tensors = setup(case)
    d_out = torch.randn(1, case.num_queries, HEADS, DIM, device=device(), dtype=case.dtype)
    return lambda: differentiate(ours(case), tensors, d_out)


def memory_points() -> list[dict[str, Any]]:
    """Peak extra memory of forward and backward at two lengths, and their ratio."""
    points = []
    for kind, window in (("full", None), ("sliding", WINDOW)):
        cases = [Case(f"{kind} {length}", BF16, length, length, window) for length in MEMORY_LENGTHS]
        used = [peak_memory(one_pass, case) for case in cases]
        ratio = {"ratio": round(used[1] / used[0], 2), "asked": MEMORY_RATIO}
        points.append(
            {"case": f"memory, {kind}, bfloat16, forward+backward", "lengths": MEMORY_LENGTHS, "bytes": used, **ratio}
        )
    return points


def prefill_points(repeats: int) -> list[dict[str, Any]]:
    """Prefill of a random model of the 20b's shape, in bfloat16, eager and wrapped (a GPU only: 42 GB of weights)."""
    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    with torch.device(device()):
        model = GptOssForCausalLM._from_config(config, dtype=BF16).eval()
    points = []
    for length in PREFILL_LENGTHS:
        tokens = torch.randint(config.vocab_size, (1, length), device=device())

        @torch.no_grad()
        def prefill(wrapped: bool, tokens: Tensor = tokens) -> Tensor:
            (with_flash_attention if wrapped else undo)(model)
            return model(tokens, logits_to_keep=1).logits

        times = alternate({"eager": partial(prefill, False), "ours": partial(prefill, True)}, repeats)
        points.append(
            {
                "case": f"prefill of the 20b shape, {length} tokens, bfloat16",
                "tokens/s": {name: round(length / statistics.median(taken), 1) for name, taken in times.items()},
                "ratio": round(median_ratio(times["eager"], times["ours"]), 2),
                "relative difference of the logits": float(
                    (prefill(True) - prefill(False)).float().norm() / prefill(False).float().norm()
                ),
            }
        )
    return points


def show(points: list[dict[str, Any]]) -> str:
    """The points as a table."""
    rows = []
    for point in points:
        for kind in ("forward", "both"):
            for peer, ratio in point.get(kind, {"ratio": {}})["ratio"].items():
                part = point[kind]
                asked = f">= {part['asked']:g}" if part["asked"] and peer == "eager" else ""
                times = part["seconds"]
                cells = (f"{times[peer]:.4g} s", f"{times['ours']:.4g} s", f"{ratio:.1f}x", asked)
                share = f"{part['share of GEMM rate']:.0%}"
                rows.append(
                    (point["case"], "forward" if kind == "forward" else "forward+backward", peer, *cells, share)
                )
        if "tokens/s" in point:
            speeds = (f"{point['tokens/s'][name]:.0f} tokens/s" for name in ("eager", "ours"))
            rows.append((point["case"], "forward", "eager", *speeds, f"{point['ratio']:.1f}x", "", ""))
        if "bytes" in point:
            used = [f"{count / 2**20:.0f} MiB" for count in point["bytes"]]
            rows.append(
                (
                    point["case"],
                    "x".join(map(str, point["lengths"])),
                    "",
                    *used,
                    f"{point['ratio']:.2f}x",
                    f"<= {point['asked']}",
                    "",
                )
            )
    return table(
        ("case", "pass", "peer", "peer time", "ours", "ratio", "asked", "of GEMM rate"), [row[:8] for row in rows]
    )


def main() -> None:
    """Run the cases, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="run only the cases whose name contains this, and write nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    cases = CPU_CASES if device().type == "cpu" else GPU_CASES
    chosen = [case for case in cases if not options.only or options.only in case.name]
    with threads(options.threads):
        rates = {dtype: gemm_rate(dtype) for dtype in {case.dtype for case in chosen}}
        points = [run(case, options.repeats, rates) for case in tqdm(chosen, unit="case")]
        points += memory_points() if not options.only else []
        points += prefill_points(options.repeats) if device().type == "cuda" and not options.only else []
        rate_points = [{"case": f"GEMM rate {dtype}", "GFLOP/s": round(rate / 1e9, 1)} for dtype, rate in rates.items()]
        print(show(points))
        for point in rate_points:
            print(f"{point['case']}: {point['GFLOP/s']} GFLOP/s")
        if not options.only:
            command = f"python -m benchmarks.attention --repeats {options.repeats} --threads {options.threads}"
            print(f"written: {record('attention', points + rate_points, command)}")


if __name__ == "__main__":
    main()
