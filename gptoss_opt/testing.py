"""Random GPT-OSS checkpoints in the released MXFP4 format, from a few kilobytes up to the exact released shapes."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

GROUP = 32
"""Values that share one scale in MXFP4 (OCP Microscaling Formats 1.0): 16 bytes of two 4-bit floats each."""

FP4_RMS = 2.926
"""Root mean square of the 4-bit floats 0, 0.5, 1, 1.5, 2, 3, 4, 6, each as likely as the other."""

SCALE_RMS = 1.323
"""Root mean square of 2**-1, 1, 2: the scales around the middle one."""


@dataclass(frozen=True)
class Size:
    """The shape of one checkpoint, named as in its config.json but for brevity."""

    layers: int
    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int
    bos: int
    pad: int
    eos: int


SIZES: dict[str, Size] = {
    # layers, hidden, intermediate, experts, per token, heads, kv heads, head dim, vocab, window, bos, pad, eos
    "tiny": Size(2, 64, 96, 4, 2, 4, 2, 16, 256, 8, 253, 254, 255),
    "small": Size(4, 512, 256, 8, 2, 16, 4, 64, 4096, 128, 4093, 4094, 4095),
    "medium": Size(8, 1024, 1024, 16, 4, 16, 4, 64, 32768, 128, 32765, 32766, 32767),
    "20b": Size(24, 2880, 2880, 32, 4, 64, 8, 64, 201088, 128, 199998, 199999, 200002),
    "120b": Size(36, 2880, 2880, 128, 4, 64, 8, 64, 201088, 128, 199998, 199999, 200002),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: its shape, and how its values are drawn.

    `kind` is "normal" (bfloat16, with this mean and std), "blocks" (uint8, two random 4-bit floats a byte) or
    "scales" (uint8, powers of two as exponent + 127: `mean` or one to either side).
    """

    shape: tuple[int, ...]
    kind: Literal["normal", "blocks", "scales"] = "normal"
    mean: float = 0.0
    std: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return torch.bfloat16 if self.kind == "normal" else torch.uint8

    @property
    def num_bytes(self) -> int:
        """The size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def draw(self, seed: int) -> Tensor:
        """The tensor of this seed, always the same."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "normal":
            return torch.empty(self.shape, dtype=self.dtype).normal_(self.mean, self.std, generator=generator)
        if self.kind == "scales":
            low = int(self.mean) - 1
            return torch.randint(low, low + 3, self.shape, dtype=self.dtype, generator=generator)
        # Eight bytes a draw: three times as fast as one, which the large sizes feel.
        words = torch.empty(self.num_bytes // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return words.view(torch.uint8).view(self.shape)


def _norm(width: int) -> TensorSpec:
    return TensorSpec((width,), mean=1.0, std=0.1)


def _bias(*shape: int) -> TensorSpec:
    return TensorSpec(shape, std=0.1)


def _linear(name: str, num_out: int, num_in: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((num_out, num_in), std=num_in**-0.5), f"{name}.bias": _bias(num_out)}


def _packed(name: str, experts: int, num_out: int, num_in: int) -> dict[str, TensorSpec]:
    """The three tensors of one expert projection. Values have a std of about 1 / sqrt(num_in), as in `_linear`."""
    exponent = round(math.log2(num_in**-0.5 / (FP4_RMS * SCALE_RMS)))
    return {
        f"{name}_blocks": TensorSpec((experts, num_out, num_in // GROUP, GROUP // 2), "blocks"),
        f"{name}_scales": TensorSpec((experts, num_out, num_in // GROUP), "scales", mean=127 + exponent),
        f"{name}_bias": _bias(experts, num_out),
    }


def _layer(size: Size) -> dict[str, TensorSpec]:
    width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
    return {
        "input_layernorm.weight": _norm(size.hidden),
        "self_attn.sinks": TensorSpec((size.heads,), std=1.0),
        **_linear("self_attn.q_proj", width, size.hidden),
        **_linear("self_attn.k_proj", kv_width, size.hidden),
        **_linear("self_attn.v_proj", kv_width, size.hidden),
        **_linear("self_attn.o_proj", size.hidden, width),
        "post_attention_layernorm.weight": _norm(size.hidden),
        **_linear("mlp.router", size.experts, size.hidden),
        **_packed("mlp.experts.gate_up_proj", size.experts, 2 * size.intermediate, size.hidden),
        **_packed("mlp.experts.down_proj", size.experts, size.hidden, size.intermediate),
    }


def shard_specs(size: Size, layers: int) -> Iterator[dict[str, TensorSpec]]:
    """The tensors of each file: the embedding, one file per layer, then the last norm and the head.

    Example:
        >>> embedding, *layers, head = shard_specs(SIZES["120b"], 36)
        >>> layers[0]["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape
        (128, 5760, 90, 16)
    """
    yield {"model.embed_tokens.weight": TensorSpec((size.vocab, size.hidden), std=1.0)}
    for index in range(layers):
        yield {f"model.layers.{index}.{name}": spec for name, spec in _layer(size).items()}
    head = TensorSpec((size.vocab, size.hidden), std=size.hidden**-0.5)
    yield {"model.norm.weight": _norm(size.hidden), "lm_head.weight": head}


def _config(size: Size, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": size.eos,
        "pad_token_id": size.pad,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "layer_types": [("sliding_attention", "full_attention")[index % 2] for index in range(layers)],
        "max_position_embeddings": 131072,
        "num_attention_heads": size.heads,
        "num_experts_per_tok": size.experts_per_token,
        "experts_per_token": size.experts_per_token,
        "num_hidden_layers": layers,
        "num_key_value_heads": size.kv_heads,
        "num_local_experts": size.experts,
        "output_router_logits": False,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "router_aux_loss_coef": 0.9,
        "sliding_window": size.window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": size.vocab,
    }


def random_checkpoint(
    path: str | os.PathLike[str],
    size: str | Size = "tiny",
    layers: int | None = None,
    seed: int = 0,
    *,
    progress: bool = False,
) -> Path:
    """Write a random GPT-OSS checkpoint in the released MXFP4 format, and return its folder.

    `from_pretrained` and every other reader of the released checkpoints take it; there is no tokenizer. Values are
    scaled by fan-in, so activations stay of order one at any depth, and greedy tokens are well apart in float32.
    Holds one layer in memory at a time, and appears at `path` only when complete.

    Args:
        path: a folder that does not exist yet, or is empty.
        size: the shape, as a `Size` or by name.
            "tiny": 2 layers, 0.2 MB, for unit tests.
            "small": 4 layers, 26 MB, with attention as a visible share of the work.
            "medium": 8 layers, 0.3 GB, large enough for memory and arithmetic to be what takes the time.
            "20b", "120b": the shapes of the released checkpoints, 24 and 36 layers, 13.8 and 65.2 GB.
        layers: how many layers to write instead; the first ones stay the same.
        seed: every tensor depends on this and on its own name only.
        progress: show a progress bar, one step per file.

    Raises:
        ValueError: there is no such size, or `layers` is below one.
        FileExistsError: `path` is a file, or a folder with something in it.

    Example:
        >>> import tempfile
        >>> folder = random_checkpoint(tempfile.mkdtemp(), "tiny")
        >>> sorted(file.name for file in folder.glob("*-00001-*"))
        ['model-00001-of-00004.safetensors']
    """
    path = Path(path).resolve()
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"there is no size {size!r}. Use one of {', '.join(map(repr, SIZES))}.")
    shape = SIZES[size] if isinstance(size, str) else size
    layers = shape.layers if layers is None else layers
    if layers < 1:
        raise ValueError(f"layers is {layers}, but a checkpoint has at least one. Leave it out for {shape.layers}.")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        what = "a folder with something in it" if path.is_dir() else "a file"
        raise FileExistsError(f"{path} is {what}. Give a folder that does not exist yet, or delete it first.")

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        _write(part, shape, layers, seed, progress)
        if path.exists():
            path.rmdir()
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return path


def _write(folder: Path, size: Size, layers: int, seed: int, progress: bool) -> None:
    shards = list(shard_specs(size, layers))
    weight_map: dict[str, str] = {}
    bar = tqdm(shards, desc="writing a random checkpoint", unit="file", disable=not progress)
    for number, specs in enumerate(bar, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(specs, file)
        # Each tensor has its own stream of random numbers, so it is the same whatever else is written.
        tensors = {name: spec.draw(zlib.crc32(f"{seed}:{name}".encode())) for name, spec in specs.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total_size = sum(spec.num_bytes for specs in shards for spec in specs.values())
    special = {"bos_token_id": size.bos, "eos_token_id": size.eos, "pad_token_id": size.pad}
    for name, content in {
        "model.safetensors.index.json": {"metadata": {"total_size": total_size}, "weight_map": weight_map},
        "config.json": _config(size, layers),
        "generation_config.json": special,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
