"""Who takes part in benchmarks.batching: each in a process of its own that holds its model, and runs when told to."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GptOssForCausalLM

from benchmarks.harness import device
from gptoss_opt import ContinuousBatcher, load, with_fast_experts, with_flash_attention, with_mxfp4_experts

VLLM_PYTHON = "GPTOSS_OPT_VLLM_PYTHON"
"""The environment variable that names the Python of vLLM's environment; see the README for how to make one."""

KV_MEMORY = 1 << 30


class Ask(NamedTuple):
    """One request: its prompt, and how many tokens to make."""

    prompt: list[int]
    new_tokens: int


class Outcome(NamedTuple):
    """How long all of them took together, and the new tokens of each."""

    seconds: float
    outputs: list[list[int]]


class Runs(Protocol):
    """What a contender does with requests, all submitted at once."""

    def __call__(self, asks: Sequence[Ask]) -> list[list[int]]: ...


class Checkpoints(NamedTuple):
    """The same weights, packed and dense."""

    packed: Path
    dense: Path


def ours(checkpoints: Checkpoints, *, packed: bool, **options: Any) -> Runs:
    """ContinuousBatcher on packed or dense experts."""
    wrapper = with_mxfp4_experts() if packed else with_fast_experts()
    folder = checkpoints.packed if packed else checkpoints.dense
    model = load(folder, wrapper, with_flash_attention(), device=device())
    memory = KV_MEMORY if device().type == "cpu" else "auto"

    def run(asks: Sequence[Ask]) -> list[list[int]]:
        batcher = ContinuousBatcher(model, **{"kv_memory": memory, "share_prefixes": False, **options})
        configs = [GenerationConfig(max_new_tokens=one.new_tokens, do_sample=False) for one in asks]
        for config in configs:
            config.eos_token_id = []
        try:
            return batcher.generate([one.prompt for one in asks], configs, progress=False)
        finally:
            batcher.close()

    return run


def _transformers(checkpoints: Checkpoints) -> GptOssForCausalLM:
    model = GptOssForCausalLM.from_pretrained(checkpoints.dense, dtype=torch.bfloat16).eval().to(device())
    model.generation_config.eos_token_id = None
    return model


def static(checkpoints: Checkpoints, *, batch: int) -> Runs:
    """transformers' generate, on left-padded batches of so many: each goes on until its longest is done."""
    model = _transformers(checkpoints)

    def run(asks: Sequence[Ask]) -> list[list[int]]:
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

    return run


def generate_batch(checkpoints: Checkpoints) -> Runs:
    """transformers' own continuous batching."""
    model = _transformers(checkpoints)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1 << 16)
    # On a GPU it finds out for itself how much it may take.
    sizes = {"num_blocks": 2048, "page_size": 16, "max_batch_tokens": 2048} if device().type == "cpu" else {}

    def run(asks: Sequence[Ask]) -> list[list[int]]:
        made: dict[str, list[int]] = {}
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**sizes)
        ) as manager:
            for number, one in enumerate(asks):
                manager.add_request(one.prompt, str(number), max_new_tokens=one.new_tokens, eos_token_id=-1)
            while len(made) < len(asks):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    made[result.request_id] = result.generated_tokens
                elif not manager.is_running():
                    raise RuntimeError(f"generate_batch stopped: {manager.background_thread_status.fatal_error}")
        return [made[str(number)] for number in range(len(asks))]

    return run


class Worker:
    """A contender of this environment, in a process of its own."""

    def __init__(self, make: Callable[[Checkpoints], Runs], checkpoints: Checkpoints, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, checkpoints, threads), daemon=True)
        self._process.start()
        there.close()
        self._answer()

    def run(self, asks: Sequence[Ask]) -> Outcome:
        """All of these, submitted at once."""
        self._here.send(list(asks))
        return Outcome(*self._answer())

    def close(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join()

    def _answer(self) -> Any:
        answer = self._here.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Any, make: Callable[[Checkpoints], Runs], checkpoints: Checkpoints, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        run = make(checkpoints)
        connection.send("ready")
        while True:
            asks = connection.recv()
            begin = time.perf_counter()
            outputs = run(asks)
            connection.send((time.perf_counter() - begin, outputs))
    except EOFError:
        pass
    except Exception as error:
        connection.send(error)


class Vllm:
    """vLLM's CPU build, in its own environment."""

    def __init__(self, checkpoints: Checkpoints, threads: int) -> None:
        self._results = Path(tempfile.mkdtemp(), "results.jsonl")
        script = Path(__file__).parent / "peers" / "vllm_cpu.py"
        settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
        self._process = subprocess.Popen(
            [os.environ[VLLM_PYTHON], str(script), str(checkpoints.dense), str(self._results)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **settings},
            cwd=tempfile.mkdtemp(),
        )
        self._read = 0
        self._answer()

    def run(self, asks: Sequence[Ask]) -> Outcome:
        """All of these, submitted at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asks) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Outcome(answer["seconds"], answer["outputs"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        while True:
            lines = self._results.read_text().splitlines(keepends=True) if self._results.exists() else []
            if len(lines) > self._read and lines[self._read].endswith("\n"):
                self._read += 1
                return json.loads(lines[self._read - 1])
            if self._process.poll() is not None:
                raise RuntimeError(f"vLLM ended with {self._process.returncode}: run {self._process.args} to see why.")
            time.sleep(0.05)
