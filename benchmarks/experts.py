"""One expert layer of gpt-oss-20b, packed and dense, beside transformers' implementations on dense bfloat16 weights.

A case is right where it is no further from float32 than twice the error of transformers in bfloat16. All take their
turn in one process; a ratio is to the fastest implementation of transformers in that run.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from benchmarks.case import Case, Point, Settings
from benchmarks.harness import alternate, device, gemm_rate, median_ratio, read_rate
from benchmarks.machine import Machine
from gptoss_opt.kernels import memory
from gptoss_opt.kernels.experts import DENSE_BACKENDS, PACKED_BACKENDS, ExpertsRequest
from gptoss_opt.layout import MXFP4, exchange
from gptoss_opt.model.experts import KEY, PROJECTIONS
from gptoss_opt.model.modules import WRAPPED

BF16 = torch.bfloat16
CONFIG = GptOssConfig(num_hidden_layers=1, num_local_experts=32)  # the 20b: hidden = intermediate = 2880, top 4
HIDDEN, NUM_EXPERTS, TOP_K = CONFIG.hidden_size, CONFIG.num_local_experts, CONFIG.num_experts_per_tok
PEERS = ("eager", "grouped_mm")
MEMORY_RATIO = 0.27

Modules = dict[str, Any]
"""Expert layers, by "transformers", "packed" and "dense"."""
Computing = dict[str, Callable[[], list[Tensor]]]
"""By contender, what computes the output, and in a backward case the gradient of the hidden states."""


@dataclass(frozen=True)
class Experts(Case):
    """One number of tokens, forward or forward and backward, and the ratios to the best peer that are asked for."""

    num_tokens: int
    backward: bool = False
    packed: float | None = None
    dense: float | None = None
    columns = """
        case   | experts | transformers     | ours           | ratio        | asked         | of GEMM rate
        {case} | {name}  | {theirs!m:.2f} ms | {ours!m:.2f} ms | {ratio:.2f}x | >= {asked:g}x | {share:.0%}
    """

    def setup(self) -> Computing:
        return self.computing(layers())

    def run(self, made: Computing, repeats: int) -> list[Point]:
        # Few tokens are quick, so that they take more turns.
        times = alternate(made, repeats if self.num_tokens >= 64 else 5 * repeats)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        best = min(PEERS, key=lambda name: median[name])
        ours = [name for name in made if name not in PEERS]
        flops = 2 * self.num_tokens * TOP_K * 3 * HIDDEN**2 * (2 if self.backward else 1)
        return [
            {
                "seconds": {name: round(taken, 6) for name, taken in median.items()},
                "best of transformers": best,
                "ratio": {name: round(median_ratio(times[best], times[name]), 2) for name in ours},
                "asked": {name: getattr(self, name) for name in ours},
                "share of GEMM rate": {name: round(flops / median[name] / gemm_rate(BF16), 3) for name in made},
                "packed bytes/s": round(self.bytes_read() / median["packed"]) if self.packed else None,
            }
        ]

    def verify(self, made: Computing, points: list[Point]) -> None:
        """Ours is no further from float32, output and gradient, than twice transformers in bfloat16 is."""
        exact = self.computing({"transformers": in_float32()}, torch.float32)["eager"]()
        errors = {
            name: [float((x.cpu().float() - y).norm() / y.norm()) for x, y in zip(compute(), exact, strict=True)]
            for name, compute in made.items()
        }
        allowed = [2 * max(both) for both in zip(*(errors[name] for name in PEERS), strict=True)]
        for name, found in errors.items():
            right = all(error <= limit for error, limit in zip(found, allowed, strict=True))
            assert right, f"{self.name}: {name} is {found} from float32, allowed {allowed}"

    def rows(self, points: list[Point]) -> Iterable[Mapping[str, Any]]:
        for point in points:
            seconds, shares = point["seconds"], point["share of GEMM rate"]
            for name, ratio in point["ratio"].items():
                times = {"theirs": seconds[point["best of transformers"]], "ours": seconds[name]}
                yield {"name": name, "ratio": ratio, "asked": point["asked"][name], "share": shares[name], **times}

    def inputs(self, to: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, experts and weights as a router that favours none gives them, and the output's gradient."""
        torch.manual_seed(self.num_tokens)
        x, d_out = torch.randn(2, self.num_tokens, HIDDEN).to(BF16).to(to, dtype)
        scores, indices = torch.randn(self.num_tokens, NUM_EXPERTS).topk(TOP_K)
        weights = scores.softmax(-1).to(BF16).to(to, dtype)
        return x.clone().requires_grad_(self.backward), indices.to(to), weights, d_out

    def computing(self, modules: Modules, dtype: torch.dtype = BF16) -> Computing:
        """The contenders on some layers: the peers compute with transformers' one."""
        x, indices, weights, d_out = self.inputs(next(modules["transformers"].parameters()).device, dtype)

        def once(name: str) -> list[Tensor]:
            module = modules[name if name in modules else "transformers"]
            if name in PEERS:
                module.config._experts_implementation = name
            if not self.backward:
                with torch.no_grad():
                    return [module(x, indices, weights)]
            out = module(x, indices, weights)
            return [out.detach(), *torch.autograd.grad(out, x, d_out)]

        ours = [name for name in ("packed", "dense") if getattr(self, name)]
        return {name: partial(once, name) for name in (*PEERS, *ours)}

    def bytes_read(self) -> int:
        """Bytes of packed weights that a forward has to read: those of the experts that are routed to."""
        routed = len(set(self.inputs(device(), BF16)[1].flatten().tolist()))
        return bytes_of(layers()["packed"]) * routed // NUM_EXPERTS


def module_of(backend: str | None) -> Any:
    """An expert layer without weights that computes with one of our backends, or as transformers does."""
    config = GptOssConfig(**CONFIG.to_dict())
    with torch.device("meta"):
        module: Any = GptOssExperts(config)
    config._experts_implementation = KEY.format(backend) if backend else "eager"
    setattr(module, WRAPPED, bool(backend))
    return module.requires_grad_(False)


@functools.cache
def layers() -> Modules:
    """The same random layer three times: transformers' and ours on one set of dense weights, and ours packed."""
    torch.manual_seed(0)
    request = ExpertsRequest(device().type, BF16, (HIDDEN, CONFIG.intermediate_size))
    chosen = [next(b.name for b in known if b.why_not(request) is None) for known in (PACKED_BACKENDS, DENSE_BACKENDS)]
    peer, packed, dense = module_of(None), module_of(chosen[0]), module_of(chosen[1])
    for projection, (num_in, num_out) in zip(PROJECTIONS, ((HIDDEN, 2 * HIDDEN), (HIDDEN, HIDDEN)), strict=True):
        shape = (NUM_EXPERTS, num_out, num_in // 32)
        stored = {
            "_blocks": memory.empty((*shape, 16), torch.uint8, device()).random_(0, 256),
            "_scales": memory.empty(shape, torch.uint8, device()).random_(117, 121),
        }
        weight = nn.Parameter(MXFP4.decode(stored, BF16), requires_grad=False)
        bias = nn.Parameter(torch.randn(NUM_EXPERTS, num_out, device=device(), dtype=BF16) / 10, requires_grad=False)
        for module in (peer, dense):
            exchange(module, projection, {projection: weight})
        frozen = {f"{projection}{suffix}": nn.Parameter(t, requires_grad=False) for suffix, t in stored.items()}
        exchange(packed, projection, frozen)
        for module in (peer, packed, dense):
            exchange(module, f"{projection}_bias", {f"{projection}_bias": bias})
    return {"transformers": peer, "packed": packed, "dense": dense}


@functools.cache
def in_float32() -> Any:
    """transformers' layer with the same weights in float32, on the CPU: the truth."""
    wide = module_of(None)
    for name, parameter in layers()["transformers"].named_parameters():
        exchange(wide, name, {name: nn.Parameter(parameter.detach().cpu().float(), requires_grad=False)})
    return wide


def bytes_of(module: nn.Module) -> int:
    """The bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


@dataclass(frozen=True)
class Memory(Case):
    """The bytes of the layer, packed and dense."""

    columns = """
        case   | MiB of transformers           | MiB packed              | ratio                | asked
        {case} | {bytes[transformers]!i:.0f}   | {bytes[packed]!i:.0f}   | {ratio[packed]:.3f}x | <= {asked[packed]}x
    """

    def run(self, made: None, repeats: int) -> list[Point]:
        held = {name: bytes_of(layers()[name]) for name in ("packed", "transformers")}
        ratio = round(held["packed"] / held["transformers"], 4)
        return [{"bytes": held, "ratio": {"packed": ratio}, "asked": {"packed": MEMORY_RATIO}}]

    def verify(self, made: None, points: list[Point]) -> None:
        """MXFP4 takes 17 bytes for 32 values, bfloat16 64; biases are dense in both."""
        values, biases = NUM_EXPERTS * 3 * HIDDEN**2, 2 * NUM_EXPERTS * 3 * HIDDEN
        assert points[0]["bytes"] == {"packed": values * 17 // 32 + biases, "transformers": 2 * values + biases}, points


def cases(settings: Settings, folder: Path) -> list[Case]:
    """Time, memory, and the rates to see them against."""
    return [
        Experts("1 tokens, forward", 1, packed=6, dense=1),
        Experts("8 tokens, forward", 8, packed=5, dense=1),
        Experts("64 tokens, forward", 64, packed=2.5, dense=1),
        Experts("512 tokens, forward", 512, packed=1.15, dense=1),
        Experts("2048 tokens, forward", 2048, packed=1, dense=1),
        Experts("512 tokens, forward+backward", 512, backward=True, packed=1, dense=1),
        Experts("2048 tokens, forward+backward", 2048, backward=True, packed=1, dense=1),
        Memory("memory of the experts"),
        Machine("machine", {"GEMM GFLOP/s": partial(gemm_rate, BF16), "read GB/s": read_rate}),
    ]


SETTINGS = Settings(repeats=5)
