"""vLLM as a contender of benchmarks.batching, in vLLM's own environment: JSON lines in, JSON lines out.

    VLLM_CPU_KVCACHE_SPACE=2 <python of vLLM> benchmarks/peers/vllm_cpu.py <dense checkpoint> <file for results>

Each line of the input is a list of [prompt ids, new tokens]; for each, one line {"seconds": s, "outputs": [[ids]]} is
added to the file. The standard output is vLLM's own.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Serve until the input ends."""
    from vllm import LLM, SamplingParams

    model = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )
    results = Path(sys.argv[2])
    answer(results, {"ready": True})
    for line in sys.stdin:
        requests = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        asked = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests]
        begin = time.perf_counter()
        made = model.generate(prompts, asked, use_tqdm=False)
        taken = time.perf_counter() - begin
        answer(results, {"seconds": taken, "outputs": [list(one.outputs[0].token_ids) for one in made]})


def answer(file: Path, what: dict[str, object]) -> None:
    """Add one more line to the results."""
    with file.open("a") as to:
        to.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main()
