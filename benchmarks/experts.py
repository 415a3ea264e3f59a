"""One expert layer of gpt-oss-20b, packed and dense, beside transformers' implementations on dense bfloat16 weights.

    python -m benchmarks.experts [--only NAME] [--repeats N] [--threads N]

Each case is verified before it is timed: no further from float32 than twice the error of transformers in bfloat16. All
take their turn in one process; a ratio is to the fastest implementation of transformers in that run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from benchmarks.harness import alternate, device, gemm_rate, median_ratio, read_rate, record, table, threads
from gptoss_opt.core import exchange
from gptoss_opt.kernels import memory
from gptoss_opt.kernels.experts import DENSE_BACKENDS, PACKED_BACKENDS, ExpertsRequest
from gptoss_opt.model.experts import KEY, MXFP4, PROJECTIONS

BF16 = torch.bfloat16
CONFIG = GptOssConfig(num_hidden_layers=1, num_local_experts=32)  # the 20b: hidden = intermediate = 2880, top 4
HIDDEN, NUM_EXPERTS, TOP_K = CONFIG.hidden_size, CONFIG.num_local_experts, CONFIG.num_experts_per_tok
PEERS = ("eager", "grouped_mm")


@dataclass(frozen=True)
class Case:
    """One point: how many tokens, whether backward as well, and the ratios that are asked for."""

    num_tokens: int
    backward: bool = False
    packed: float | None = None
    dense: float | None = None

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.num_tokens} tokens, forward{'+backward' * self.backward}"


CASES = (
    Case(1, packed=6, dense=1),
    Case(8, packed=5, dense=1),
    Case(64, packed=2.5, dense=1),
    Case(512, packed=1.15, dense=1),
    Case(2048, dense=1),
    Case(512, backward=True, packed=1),
)
MEMORY_RATIO = 0.27


def module_of(backend: str | None) -> GptOssExperts:
    """An expert layer without weights that computes with one of our backends, or as transformers does."""
    config = GptOssConfig(**CONFIG.to_dict())
    with torch.device("meta"):
        module = GptOssExperts(config)
    config._experts_implementation = KEY.format(backend) if backend else "eager"
    return module.requires_grad_(False)


def layers() -> dict[str, GptOssExperts]:
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


def inputs(case: Case, to: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, experts and weights as a router that favours none gives them, and the gradient of the output."""
    torch.manual_seed(case.num_tokens)
    x, d_out = torch.randn(2, case.num_tokens, HIDDEN).to(BF16).to(to, dtype)
    scores, indices = torch.randn(case.num_tokens, NUM_EXPERTS).topk(TOP_K)
    weights = scores.softmax(-1).to(BF16).to(to, dtype)
    return x.clone().requires_grad_(case.backward), indices.to(to), weights, d_out


def runs(
    case: Case, modules: dict[str, GptOssExperts], dtype: torch.dtype = BF16
) -> dict[str, Callable[[], list[Tensor]]]:
    """By name, what computes the output, and in a backward case the gradient of the hidden states."""
    where = next(modules["transformers"].parameters()).device
    x, indices, weights, d_out = inputs(case, where, dtype)

    def once(name: str) -> list[Tensor]:
        module = modules[name if name in modules else "transformers"]
        if name in PEERS:
            module.config._experts_implementation = name
        if not case.backward:
            with torch.no_grad():
                return [module(x, indices, weights)]
        out = module(x, indices, weights)
        return [out.detach(), *torch.autograd.grad(out, x, d_out)]

    ours = [name for name in ("packed", "dense") if getattr(case, name)]
    return {name: partial(once, name) for name in (*PEERS, *ours)}


def in_float32(peer: GptOssExperts) -> GptOssExperts:
    """transformers' layer with the same weights in float32, on the CPU: the truth."""
    wide = module_of(None)
    for name, parameter in peer.named_parameters():
        exchange(wide, name, {name: nn.Parameter(parameter.detach().cpu().float(), requires_grad=False)})
    return wide


def verify(case: Case, truth: GptOssExperts, computed: dict[str, list[Tensor]]) -> None:
    """Ours is no further from float32, output and gradient, than twice transformers in bfloat16 is."""
    exact = runs(case, {"transformers": truth}, torch.float32)["eager"]()
    errors = {
        name: [float((a.cpu().float() - b).norm() / b.norm()) for a, b in zip(out, exact, strict=True)]
        for name, out in computed.items()
    }
    allowed = [2 * max(both) for both in zip(*(errors[name] for name in PEERS), strict=True)]
    for name, found in errors.items():
        if not all(error <= most for error, most in zip(found, allowed, strict=True)):
            raise AssertionError(f"{case.name}: {name} is {found} from float32, allowed {allowed}")


def run(
    case: Case, modules: dict[str, GptOssExperts], truth: GptOssExperts, repeats: int, rate: float
) -> dict[str, Any]:
    """One verified point."""
    computing = runs(case, modules)
    verify(case, truth, {name: compute() for name, compute in computing.items()})
    times = alternate(computing, repeats if case.num_tokens >= 64 else 5 * repeats)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    best = min(PEERS, key=lambda name: median[name])
    flops = 2 * case.num_tokens * TOP_K * 3 * HIDDEN**2 * (2 if case.backward else 1)
    return {
        "case": case.name,
        "seconds": {name: round(taken, 6) for name, taken in median.items()},
        "best of transformers": best,
        "ratio": {name: round(median_ratio(times[best], times[name]), 2) for name in computing if name not in PEERS},
        "asked": {name: getattr(case, name) for name in computing if name not in PEERS},
        "share of GEMM rate": {name: round(flops / median[name] / rate, 3) for name in computing},
        "packed bytes/s": round(_bytes_read(case, modules) / median["packed"]) if case.packed else None,
    }


def _bytes_read(case: Case, modules: dict[str, GptOssExperts]) -> int:
    """Bytes of packed weights that a forward has to read: those of the experts that are routed to."""
    routed = inputs(case, device(), BF16)[1].unique().numel()
    return _bytes(modules["packed"]) * routed // NUM_EXPERTS


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def memory_point(modules: dict[str, GptOssExperts]) -> dict[str, Any]:
    """The bytes of the layer, packed and dense."""
    packed, dense = _bytes(modules["packed"]), _bytes(modules["transformers"])
    return {
        "case": "memory of the experts",
        "bytes": {"packed": packed, "transformers": dense},
        "ratio": {"packed": round(packed / dense, 4)},
        "asked": {"packed": MEMORY_RATIO},
    }


def show(points: list[dict[str, Any]]) -> str:
    """The points as a table."""
    rows = []
    for point in points:
        for name, ratio in point.get("ratio", {}).items():
            asked = point["asked"][name]
            if "bytes" in point:
                sizes = (f"{point['bytes'][which] / 2**20:.0f} MiB" for which in ("transformers", name))
                rows.append((point["case"], name, *sizes, f"{ratio:.3f}x", f"<= {asked:g}x", ""))
                continue
            times = (f"{point['seconds'][which] * 1e3:.2f} ms" for which in (point["best of transformers"], name))
            share = f"{point['share of GEMM rate'][name]:.0%}"
            rows.append((point["case"], name, *times, f"{ratio:.2f}x", f">= {asked:g}x", share))
    return table(("case", "ours", "transformers", "ours", "ratio", "asked", "of GEMM rate"), rows)


def main() -> None:
    """Run the cases, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="run only the cases whose name contains this, and write nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.only or options.only in case.name]
    with threads(options.threads):
        modules, rate, reads = layers(), gemm_rate(BF16), read_rate()
        truth = in_float32(modules["transformers"])
        points = [run(case, modules, truth, options.repeats, rate) for case in tqdm(chosen, unit="case")]
        points.append(memory_point(modules))
        points.append({"case": "machine", "GEMM GFLOP/s": round(rate / 1e9, 1), "read GB/s": round(reads / 1e9, 1)})
        print(show(points))
        print(f"GEMM {rate / 1e9:.0f} GFLOP/s in bfloat16, memory read at {reads / 1e9:.0f} GB/s")
        if not options.only:
            command = f"python -m benchmarks.experts --repeats {options.repeats} --threads {options.threads}"
            print(f"written: {record('experts', points, command)}")


if __name__ == "__main__":
    main()
