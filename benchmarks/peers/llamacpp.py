"""llama.cpp as a contender of benchmarks.whole, in an environment of its own with llama-cpp-python and gguf.

    <that python> benchmarks/peers/llamacpp.py <packed checkpoint> <file for results>

The checkpoint is written as a GGUF file with the same bits: MXFP4 experts, bfloat16 products, float32 for the rest.
Each line of the input is a list of [prompt ids, new tokens], served one after the other; for each, one line
{"seconds": s, "outputs": [[ids]]} is added to the file.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
}
PRODUCTS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "embed_tokens.weight", "lm_head.weight")
Arrays = dict[str, np.ndarray]


def tensors(folder: Path) -> Arrays:
    """All tensors of a checkpoint as they lie in its files; bfloat16 as uint16."""
    found: Arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        length = int.from_bytes(file.open("rb").read(8), "little")
        header = json.loads(file.open("rb").read(8 + length)[8:])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype = {"BF16": np.uint16, "U8": np.uint8}[entry["dtype"]]
            begin = 8 + length + entry["data_offsets"][0]
            found[name] = np.memmap(file, dtype, "r", begin, tuple(entry["shape"]))
    return found


def widened(values: np.ndarray) -> np.ndarray:
    """bfloat16 as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def packed(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 as GGUF has it: blocks of 17 bytes, the scale first; low nibbles are the first 16 values, high the rest."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-1], 32)
    halves = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], halves], -1).reshape(*blocks.shape[:2], -1)


def projections(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The projections that a tensor of all experts holds: gate and up lie interleaved."""
    parts = {"gate": values[:, ::2], "up": values[:, 1::2]} if "gate_up" in name else {"down": values}
    return [(part, np.ascontiguousarray(some)) for part, some in parts.items()]


def write(folder: Path, to: Path) -> None:
    """Write a checkpoint as one GGUF file."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_scaling") or config["rope_parameters"]
    writer = gguf.GGUFWriter(to, "gpt-oss")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kinds = gguf.GGMLQuantizationType
    found = tensors(folder)
    for name, values in found.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if "experts" not in name:
            module, _, last = rest.rpartition(".")
            target = NAMES.get(name) or f"blk.{layer}.{NAMES.get(rest) or f'{NAMES[module]}.{last}'}"
            if name.endswith(PRODUCTS):
                writer.add_tensor(target, np.ascontiguousarray(values).view(np.uint8), raw_dtype=kinds.BF16)
            else:
                writer.add_tensor(target, widened(values))
        elif name.endswith("_blocks"):
            for part, some in projections(name, packed(values, found[name.replace("_blocks", "_scales")])):
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", some, raw_dtype=kinds.MXFP4)
        elif name.endswith("_bias"):
            for part, some in projections(name, widened(values)):
                writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.bias", some)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Serve until the input ends."""
    from llama_cpp import Llama

    threads = int(os.environ["OMP_NUM_THREADS"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        write(Path(sys.argv[1]), file)
        model = Llama(str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
        results = Path(sys.argv[2])
        answer(results, {"ready": True})
        for line in sys.stdin:
            begin = time.perf_counter()
            outputs = [generate(model, prompt, count) for prompt, count in json.loads(line)]
            answer(results, {"seconds": time.perf_counter() - begin, "outputs": outputs})


def generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, one after the other."""
    model.reset()
    model.eval(prompt)
    made: list[int] = []
    while True:
        made.append(int(np.argmax(model._ctx.get_logits_ith(-1)[: model.n_vocab()])))
        if len(made) == count:
            return made
        model.eval(made[-1:])


def answer(file: Path, what: dict[str, object]) -> None:
    """Add one more line to the results."""
    with file.open("a") as to:
        to.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main()
