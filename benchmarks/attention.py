"""Attention with sinks, beside transformers' eager attention, in the head geometry of gpt-oss-20b.

Output and gradients are verified against the peer's, in the same dtype; peer and ours run in turn. The peer gets its
mask ready made. On a CUDA device the cases are longer, and flex_attention is a peer as well.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate, device, gemm_rate, median_ratio, peak_memory
from benchmarks.machine import Machine
from gptoss_opt import undo, with_flash_attention
from gptoss_opt.kernels.attention import BACKENDS, AttentionRequest, attention

HEADS, KV_HEADS, DIM = 64, 8, 64
WINDOW = 128
F32, BF16 = torch.float32, torch.bfloat16
# Eager scores of 32768 keys fill a card: beyond this, flex_attention is the only peer.
MAX_EAGER_KEYS = 8192
PREFILL_LENGTHS = (2048, 8192)
MEMORY_LENGTHS, MEMORY_RATIO = (4096, 8192), 2.2

Attend = Callable[..., Tensor]
"""Attention of q, k, v and sinks, as [1, T, H, D]."""


class Problem(NamedTuple):
    """q, k, v and sinks, the gradient of the output, and who computes with them."""

    tensors: list[Tensor]
    d_out: Tensor
    contenders: dict[str, Attend]


@dataclass(frozen=True)
class Attention(Case):
    """Forward, and forward with backward, of one shape.

    Attributes:
        forward: the ratio to eager that is asked for (None: it is reported only).
        both: the same of forward and backward.
    """

    dtype: torch.dtype
    num_queries: int
    num_keys: int
    window: int | None = None
    forward: float | None = None
    both: float | None = None
    columns = """
        case   | pass   | peer   | peer time      | ours         | ratio        | asked         | of GEMM rate
        {case} | {pass} | {peer} | {theirs:.4g} s | {ours:.4g} s | {ratio:.1f}x | >= {asked:g}x | {share:.0%}
    """

    def setup(self) -> Problem:
        peers = {"eager": eager} if self.num_keys <= MAX_EAGER_KEYS else {}
        if device().type == "cuda":
            peers["flex_attention"] = flex
        contenders = {"ours": ours(self), **{name: peer(self) for name, peer in peers.items()}}
        return Problem(*tensors_of(self), contenders)

    def run(self, made: Problem, repeats: int) -> list[Point]:
        passes: dict[str, Callable[[Attend], object]] = {
            "forward": torch.no_grad()(lambda attend: attend(*made.tensors)),
            "both": lambda attend: differentiate(attend, made.tensors, made.d_out),
        }
        if self.num_queries == 1:
            del passes["both"]
        point: Point = {}
        for kind, once in passes.items():
            times = alternate({name: partial(once, attend) for name, attend in made.contenders.items()}, repeats)
            median = {name: statistics.median(taken) for name, taken in times.items()}
            flops = flops_of(self) * (3.5 if kind == "both" else 1)
            point[kind] = {
                "seconds": {name: round(taken, 6) for name, taken in median.items()},
                "ratio": {name: round(median_ratio(times[name], times["ours"]), 2) for name in times if name != "ours"},
                "asked": getattr(self, kind),
                "share of GEMM rate": round(flops / median["ours"] / gemm_rate(self.dtype), 3),
            }
        return [point]

    def verify(self, made: Problem, points: list[Point]) -> None:
        """Output and gradients of the peers are ours, as far as the dtype allows."""
        allowed = 64 * torch.finfo(self.dtype).eps
        computed = {name: differentiate(attend, *made[:2]) for name, attend in made.contenders.items()}
        expected = computed.pop("ours")
        for name, found in computed.items():
            for what, x, y in zip(("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
                error = float((x.double() - y.double()).norm() / y.double().norm())
                assert error <= allowed, f"{self.name}: {what} of {name} differs by {error:.2g}, allowed {allowed:.2g}"
        points[0]["verified against"] = list(computed)

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for kind, label in (("forward", "forward"), ("both", "forward+backward")):
            found = points[0].get(kind, {"ratio": {}})
            for peer, ratio in found["ratio"].items():
                times, asked = found["seconds"], found["asked"] if peer == "eager" else None
                shown = {"pass": label, "peer": peer, "ratio": ratio, "asked": asked}
                yield shown | {"theirs": times[peer], "ours": times["ours"], "share": found["share of GEMM rate"]}


@dataclass(frozen=True)
class Memory(Case):
    """The peak of what forward and backward of ours allocate at two lengths, each in a process of its own."""

    window: int | None
    columns = """
        case   | tokens                    | peaks                                        | ratio        | asked
        {case} | {lengths[0]}, {lengths[1]} | {bytes[0]!i:.0f} MiB, {bytes[1]!i:.0f} MiB | {ratio:.2f}x | <= {asked:g}x
    """

    def setup(self) -> list[Attention]:
        return [Attention(self.name, BF16, length, length, self.window) for length in MEMORY_LENGTHS]

    def run(self, made: list[Attention], repeats: int) -> list[Point]:
        used = [peak_memory(one_pass, case) for case in made]
        ratio = round(used[1] / used[0], 2)
        return [{"lengths": MEMORY_LENGTHS, "bytes": used, "ratio": ratio, "asked": MEMORY_RATIO}]

    def verify(self, made: list[Attention], points: list[Point]) -> None:
        """The peak holds at least the output and the gradients."""
        for case, used in zip(made, points[0]["bytes"], strict=True):
            assert used >= 2 * DIM * (2 * HEADS * case.num_queries + 2 * KV_HEADS * case.num_keys), points


@dataclass(frozen=True)
class Prefill(Case):
    """Prefill of a random model of the 20b's shape, in bfloat16, eager and wrapped (a GPU only: 42 GB of weights)."""

    length: int
    columns = """
        case   | eager                            | ours                            | ratio
        {case} | {tokens/s[eager]:.0f} tokens/s   | {tokens/s[ours]:.0f} tokens/s   | {ratio:.1f}x
    """

    def setup(self) -> Callable[[bool], Tensor]:
        model = prefill_model()
        tokens = torch.randint(model.config.vocab_size, (1, self.length), device=device())

        def prefill(wrapped: bool) -> Tensor:
            (with_flash_attention if wrapped else undo)(model)
            with torch.no_grad():
                logits: Tensor = model(tokens, logits_to_keep=1).logits
            return logits.float()

        return prefill

    def run(self, made: Callable[[bool], Tensor], repeats: int) -> list[Point]:
        times = alternate({"eager": partial(made, False), "ours": partial(made, True)}, repeats)
        speeds = {name: round(self.length / statistics.median(taken), 1) for name, taken in times.items()}
        return [{"tokens/s": speeds, "ratio": round(median_ratio(times["eager"], times["ours"]), 2)}]

    def verify(self, made: Callable[[bool], Tensor], points: list[Point]) -> None:
        """The logits are numbers; how far they are from eager's, which rounds otherwise, is reported."""
        difference = float((made(True) - made(False)).norm() / made(False).norm())
        assert math.isfinite(difference), "the logits are not finite"
        points[0]["relative difference of the logits"] = difference


@functools.cache
def prefill_model() -> Any:
    """A random model of the 20b's shape."""
    with torch.device(device()):
        return GptOssForCausalLM._from_config(
            GptOssConfig(num_hidden_layers=24, num_local_experts=32), dtype=BF16
        ).eval()


def tensors_of(case: Attention) -> tuple[list[Tensor], Tensor]:
    """Random q, k, v and sinks, and the gradient of the output."""
    torch.manual_seed(0)
    shapes = ((HEADS, case.num_queries), (KV_HEADS, case.num_keys), (KV_HEADS, case.num_keys))
    tensors = [*(torch.randn(1, heads, length, DIM) for heads, length in shapes), torch.randn(HEADS)]
    d_out = torch.randn(1, case.num_queries, HEADS, DIM, device=device(), dtype=case.dtype)
    return [x.to(device(), case.dtype).requires_grad_() for x in tensors], d_out


def ours(case: Attention) -> Attend:
    """Our attention, by the backend that a model of this dtype gets here."""
    request = AttentionRequest(device().type, case.dtype, DIM)
    backend = next(one.name for one in BACKENDS if one.why_not(request) is None)
    attend = partial(attention, scale=DIM**-0.5, window=case.window, backend=backend)
    return lambda q, k, v, sinks: attend(q, k, v, sinks).transpose(1, 2)


def eager(case: Attention) -> Attend:
    """transformers' eager attention, its mask ready made."""
    slot = torch.arange(case.num_queries, device=device())[:, None] + case.num_keys - case.num_queries
    key = torch.arange(case.num_keys, device=device())
    seen = (key <= slot) & (key > slot - (case.window or case.num_keys))
    lowest = torch.finfo(case.dtype).min
    mask = torch.zeros(seen.shape, dtype=case.dtype, device=device()).masked_fill_(~seen, lowest)[None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        module: Any = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, sinks=sinks, training=False)
        out: Tensor = eager_attention_forward(module, q, k, v, mask, DIM**-0.5)[0]
        return out

    return attend


def flex(case: Attention) -> Attend:
    """torch's flex_attention, compiled, with the sink put in through its log-sum-exp."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - (case.window or case.num_keys))

    # One function is compiled for so many masks only, and then runs without the compiler.
    torch.compiler.reset()
    mask = create_block_mask(seen, None, None, case.num_queries, case.num_keys, device=device())
    compiled: Any = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = compiled(q, k, v, block_mask=mask, scale=DIM**-0.5, enable_gqa=True, return_lse=True)
        weight = torch.sigmoid(lse - sinks.float()[None, :, None])
        sunk: Tensor = (out * weight[..., None].to(out.dtype)).transpose(1, 2)
        return sunk

    return attend


def differentiate(attend: Attend, tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, d_out)]


def one_pass(case: Attention) -> Callable[[], object]:
    """Forward and backward of ours, ready to run."""
    return partial(differentiate, ours(case), *tensors_of(case))


def flops_of(case: Attention) -> float:
    """Operations of the forward on the (query, key) pairs that see each other; the backward does 2.5 times as many."""
    keys = torch.arange(case.num_queries) + case.num_keys - case.num_queries + 1
    pairs = keys.clamp(max=case.window or case.num_keys).sum().item()
    return 4.0 * HEADS * DIM * pairs


CPU_CASES = (
    Attention("full 2048 float32", F32, 2048, 2048, None, 10, 5),
    Attention("full 2048 bfloat16", BF16, 2048, 2048, None, 4, 3),
    Attention("sliding 4096 float32", F32, 4096, 4096, WINDOW, 20, 10),
    Attention("sliding 4096 bfloat16", BF16, 4096, 4096, WINDOW, 20, 10),
    Attention("decode 4096 float32", F32, 1, 4096, None, 4),
    Attention("decode 4096 bfloat16", BF16, 1, 4096, None, 4),
    Attention("decode 4096 sliding bfloat16", BF16, 1, 4096, WINDOW),
)
GPU_CASES = tuple(
    Attention(f"{'sliding' if window else 'full'} {length} bfloat16", BF16, length, length, window)
    for length in (2048, 8192, 32768)
    for window in (None, WINDOW)
)


def cases(settings: Settings, folder: Path) -> list[Case]:
    """The shapes of this kind of machine, memory, on a GPU the whole model, and the rates to see them against."""
    on_gpu = device().type == "cuda"
    shapes = GPU_CASES if on_gpu else CPU_CASES
    kinds = {"full": None, "sliding": WINDOW}
    rates = {f"GEMM rate {case.dtype}": {"GFLOP/s": partial(gemm_rate, case.dtype)} for case in shapes}
    return [
        *shapes,
        *(Memory(f"memory, {kind}, bfloat16, forward+backward", window) for kind, window in kinds.items()),
        *(Prefill(f"prefill of the 20b shape, {n} tokens, bfloat16", n) for n in PREFILL_LENGTHS if on_gpu),
        *(Machine(name, rate) for name, rate in rates.items()),
    ]


SETTINGS = Settings()
