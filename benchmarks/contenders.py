"""Who takes part in `batching` and `whole`: each holds its model in a process of its own, and runs when told to."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GptOssForCausalLM

from benchmarks.harness import device
from benchmarks.load import apart
from gptoss_opt import (
    ContinuousBatcher,
    load,
    with_fast_experts,
    with_fast_linears,
    with_flash_attention,
    with_mxfp4_experts,
)
from gptoss_opt.apart import Apart
from gptoss_opt.testing import random_checkpoint

VLLM_PYTHON = "GPTOSS_OPT_VLLM_PYTHON"
"""The environment variable that names the Python of vLLM's environment; see the README for how to make one."""

LLAMA_PYTHON = "GPTOSS_OPT_LLAMA_PYTHON"
"""The same for an environment with llama-cpp-python and gguf."""

KV_MEMORY = 1 << 30


class Ask(NamedTuple):
    """One request: its prompt, and how many tokens to make."""

    prompt: list[int]
    new_tokens: int


class Outcome(NamedTuple):
    """How many seconds all requests took together, and the new tokens of each."""

    seconds: float
    outputs: list[list[int]]


Runs = Callable[[Sequence[Ask]], Outcome]
"""What a contender does with requests that are all submitted at once."""


class Checkpoints(NamedTuple):
    """The same weights, packed and dense."""

    packed: Path
    dense: Path


@functools.cache
def checkpoints(folder: Path, size: str, layers: int | None = None) -> Checkpoints:
    """A random checkpoint, as released, and dequantised by a process that gives its memory back."""
    made = Checkpoints(random_checkpoint(folder / "packed", size, layers, progress=True), folder / "dense")
    apart(_dequantise, made)
    return made


def _dequantise(checkpoints: Checkpoints) -> None:
    model: Any = load(checkpoints.packed)
    model.save_pretrained(checkpoints.dense)


def timed(serve: Callable[[Sequence[Ask]], list[list[int]]]) -> Runs:
    """The same, timed from outside."""

    def run(asks: Sequence[Ask]) -> Outcome:
        begin = time.perf_counter()
        outputs = serve(asks)
        return Outcome(time.perf_counter() - begin, outputs)

    return run


def ours(checkpoints: Checkpoints, *, packed: bool, **options: Any) -> Runs:
    """ContinuousBatcher on packed or dense experts."""
    wrapper = with_mxfp4_experts() if packed else with_fast_experts()
    folder = checkpoints.packed if packed else checkpoints.dense
    model = load(folder, wrapper, with_flash_attention(), with_fast_linears(), device=device())
    settings = {"kv_memory": KV_MEMORY if device().type == "cpu" else "auto", "share_prefixes": False, **options}

    def serve(asks: Sequence[Ask]) -> list[list[int]]:
        configs = [GenerationConfig(max_new_tokens=one.new_tokens, do_sample=False) for one in asks]
        for config in configs:
            config.eos_token_id = []
        with closing(ContinuousBatcher(model, **settings)) as batcher:
            return batcher.generate([one.prompt for one in asks], configs, progress=False)

    return timed(serve)


def generating(checkpoints: Checkpoints, *, packed: bool) -> Runs:
    """`generate` of a wrapped model, one request after the other."""
    wrapper, folder = (with_mxfp4_experts(), checkpoints.packed) if packed else (with_fast_experts(), checkpoints.dense)
    return timed(
        functools.partial(
            _generate, load(folder, wrapper, with_flash_attention(), with_fast_linears(), device=device())
        )
    )


def transformers(checkpoints: Checkpoints, *, experts: str) -> Runs:
    """transformers' `generate`, with one of its ways to compute the experts."""
    return timed(functools.partial(_generate, _transformers(checkpoints, experts_implementation=experts)))


def _generate(model: Any, asks: Sequence[Ask]) -> list[list[int]]:
    outputs = []
    for prompt, count in asks:
        tokens = torch.tensor([prompt], device=model.device)
        exactly: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None}
        made = model.generate(tokens, do_sample=False, pad_token_id=0, **exactly)
        outputs.append(made[0, len(prompt) :].tolist())
    return outputs


def _transformers(checkpoints: Checkpoints, **options: Any) -> Any:
    model: Any = GptOssForCausalLM.from_pretrained(checkpoints.dense, dtype=torch.bfloat16, **options).eval()
    model.generation_config.eos_token_id = None
    return model.to(device())


def static(checkpoints: Checkpoints, *, batch: int) -> Runs:
    """transformers' generate on left-padded batches, each of which goes on until its longest is done."""
    model = _transformers(checkpoints)

    def serve(asks: Sequence[Ask]) -> list[list[int]]:
        outputs = []
        for begin in range(0, len(asks), batch):
            some = asks[begin : begin + batch]
            longest = max(len(one.prompt) for one in some)
            rows = [[0] * (longest - len(one.prompt)) + one.prompt for one in some]
            mask = [[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in some]
            made = model.generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max(one.new_tokens for one in some),
                do_sample=False,
                pad_token_id=0,
            )
            outputs += [row[longest:][: one.new_tokens] for row, one in zip(made.tolist(), some, strict=True)]
        return outputs

    return timed(serve)


def generate_batch(checkpoints: Checkpoints) -> Runs:
    """transformers' own continuous batching."""
    model = _transformers(checkpoints)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1 << 16)
    # On a GPU it finds out for itself how much it may take.
    on_cpu = device().type == "cpu"
    sizes: dict[str, Any] = {"num_blocks": 2048, "page_size": 16, "max_batch_tokens": 2048} if on_cpu else {}

    def serve(asks: Sequence[Ask]) -> list[list[int]]:
        made: dict[str, list[int]] = {}
        serving = {"generation_config": config, "continuous_batching_config": ContinuousBatchingConfig(**sizes)}
        with model.continuous_batching_context_manager(**serving) as manager:
            for number, one in enumerate(asks):
                manager.add_request(one.prompt, str(number), max_new_tokens=one.new_tokens, eos_token_id=-1)
            while len(made) < len(asks):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    made[result.request_id] = result.generated_tokens
                elif not manager.is_running():
                    raise RuntimeError(f"generate_batch stopped: {manager.background_thread_status.fatal_error}")
        return [made[str(number)] for number in range(len(asks))]

    return timed(serve)


def vllm(checkpoints: Checkpoints) -> Runs:
    """vLLM's CPU build, run by a script in its own environment, on dense weights: it has packed ones on few CPUs."""
    binding = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{torch.get_num_threads() - 1}"}
    return _by_script(VLLM_PYTHON, "vllm_cpu.py", checkpoints.dense, binding)


def llama(checkpoints: Checkpoints) -> Runs:
    """llama.cpp, run by a script in its own environment, on the same packed bits."""
    return _by_script(
        LLAMA_PYTHON, "llamacpp.py", checkpoints.packed, {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    )


def _by_script(python: str, name: str, checkpoint: Path, settings: Mapping[str, str]) -> Runs:
    """A script of peers/, which reads JSON lines and writes some: the Python of its environment is in a variable."""
    results, num_read = Path(tempfile.mkdtemp(), "results.jsonl"), 0
    command = [os.environ[python], str(Path(__file__).parent / "peers" / name), str(checkpoint), str(results)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": results.parent}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env={**os.environ, **settings}, **quiet)
    requests = process.stdin
    assert requests is not None

    def answer() -> Any:
        nonlocal num_read
        while True:
            lines = results.read_text().splitlines(keepends=True) if results.exists() else []
            if len(lines) > num_read and lines[num_read].endswith("\n"):
                num_read += 1
                return json.loads(lines[num_read - 1])
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}. Run this to see why: {' '.join(command)}")
            time.sleep(0.05)

    def run(asks: Sequence[Ask]) -> Outcome:
        requests.write(json.dumps(asks) + "\n")
        requests.flush()
        found = answer()
        return Outcome(found["seconds"], found["outputs"])

    answer()
    return run


class Contender(Apart):
    """A contender loads its model in a process of its own when it first runs, and holds it until it is closed.

    Attributes:
        outcomes: what each of its runs gave, but for the warm-up.
    """

    def __init__(self, make: Callable[..., Runs], *args: Any, **options: Any) -> None:
        super().__init__(make, *args, **options)
        self.outcomes: list[Outcome] = []

    def run(self, asks: Sequence[Ask], warm: Sequence[Ask]) -> None:
        """Serve requests that are all submitted at once; before its first run it serves some that do not count."""
        if not self.started:
            self.ask(list(warm))
        self.outcomes.append(Outcome(*self.ask(list(asks))))
