"""The tables of the demo, as data. A new wrapper adds a case; a new table, a comparison."""

from __future__ import annotations

from dataclasses import replace

from .. import (
    compose,
    shard_experts,
    shard_tensor_parallel,
    with_chunked_loss,
    with_fast_experts,
    with_flash_attention,
    with_full_finetuning,
    with_lora,
    with_mxfp4_experts,
)
from ..testing import SIZES
from .comparison import Case, Column, Comparison
from .decoding import PROMPT_LENGTH, measure_experts, measure_sharded
from .finetuning import NUM_TOKENS, STEPS, in_peft, measure_finetuning
from .serving import MAX_PROMPT, MIN_PROMPT, NUM_PROMPTS, measure_serving
from .stacks import measure_stacks

WIDE = replace(SIZES["20b"], layers=1, experts=8, vocab=4096, bos=4093, pad=4094, eos=4095)
"""One layer as wide as those of gpt-oss-20b, with 8 of its 32 experts: a token reads as much as there."""

SAME_TOKENS = Column("same greedy tokens", lambda n: "yes" if n[0] == n[1] else "first {} of {}".format(*n), "first")
MAX_LOGIT = Column("max logit diff", "{:.1e}".format, "first")
SINKS = Column("sink grad diff", "{:.1e}".format, "first", missing="no gradient")
PEAK = Column("peak memory", lambda num_bytes: f"{num_bytes / 2**20:.0f} MiB", "less")
SECONDS, MIB, SPEED = "{:.2f} s".format, "{:.1f} MiB".format, "{:.1f} tokens/s".format

STACKS = Comparison(
    title="{name}, dtype {dtype}, {new_tokens} new tokens, on {device} ({threads} threads)",
    columns=(
        *(Column("length"), Column("stack"), SAME_TOKENS, MAX_LOGIT, SINKS),
        Column("generate", SECONDS, "less"),
        Column("train step", SECONDS, "less"),
        PEAK,
    ),
    footnote="""\
Differences and (ratios) are to the first row of each length; the sink gradient difference is relative.
Each was run once. Train step: forward with labels, and backward. Peak memory: the most that both took beyond the
loaded model (on CUDA as torch counts it, on Linux the resident memory of the process, n/a elsewhere).""",
    cases=(Case("eager (transformers)"), Case("with_flash_attention", with_flash_attention())),
    measure=measure_stacks,
    per_length=True,
)

EXPERTS = Comparison(
    title=f"{{name}}, dtype {{dtype}}, {{new_tokens}} tokens after {PROMPT_LENGTH}",
    columns=(
        *(Column("experts"), SAME_TOKENS, MAX_LOGIT),
        Column("load", SECONDS, "less"),
        Column("expert weights", MIB, "less"),
        Column("decode", SPEED, "more"),
    ),
    footnote="""\
Load: from the file to a model; the first row by transformers, the others by gptoss_opt.load. Expert weights: as they
are stored. Decode: one token after the other, by the median step of generate.""",
    cases=(
        Case("dense (transformers)"),
        Case("with_fast_experts", with_fast_experts()),
        Case("with_mxfp4_experts", with_mxfp4_experts()),
    ),
    measure=measure_experts,
    wide=True,
    dtype=lambda asked: "float32" if asked == "float32" else "bfloat16",
)

SHARDED = Comparison(
    title=EXPERTS.title,
    columns=(
        *(Column("held by"), SAME_TOKENS, MAX_LOGIT),
        Column("parameters of a rank", MIB, "share"),
        Column("decode", SPEED),
    ),
    footnote="""\
Every rank computes its part of every token. On one machine's cores, ranks share what one process has to itself: what
they save here is memory. Across machines: docs/several_nodes.md.""",
    cases=(
        Case("one process"),
        Case("shard_tensor_parallel", shard_tensor_parallel()),
        Case("shard_experts", shard_experts()),
        Case("both", compose(shard_tensor_parallel(), shard_experts())),
    ),
    measure=measure_sharded,
    on_ranks=True,
    dtype=lambda asked: "bfloat16" if asked in ("bfloat16", "float16") else "float32",
)

SERVING = Comparison(
    title=f"{{name}}, dtype {{dtype}}, {NUM_PROMPTS} prompts of {MIN_PROMPT} to {MAX_PROMPT} tokens",
    columns=(
        Column("served by"),
        replace(SAME_TOKENS, form=lambda n: "yes" if n[0] == n[1] else "{} of {}".format(*n)),
        MAX_LOGIT,
        Column("speed", SPEED, "more"),
        Column("first token", "{:.0f} ms".format, missing="-"),
        Column("keys and values", "{:.0f} KiB".format, "less"),
    ),
    footnote="""\
Same greedy tokens: before the first of each prompt that differs. Max logit diff: after each prompt, less the mean.
Speed: by the tokens that were asked for. First token: the median; generate gives all at the end. Keys and values: the
most that was held, of pages those in use.""",
    cases=(
        Case("generate, one batch (transformers)"),
        Case("ContinuousBatcher", batcher=True),
        Case("ContinuousBatcher, with_mxfp4_experts", with_mxfp4_experts(), batcher=True),
    ),
    measure=measure_serving,
    wide=True,
    dtype=EXPERTS.dtype,
)

LONG = compose(with_flash_attention(), with_chunked_loss())
"""What a long row needs, whatever is trained."""

FINETUNING = Comparison(
    title=f"{{name}}, dtype {{dtype}}, {STEPS} steps of AdamW on a row of {NUM_TOKENS} tokens",
    columns=(
        Column("fine-tuning"),
        *(Column(f"{step} loss", "{:.4f}".format) for step in ("first", "last")),
        Column("speed", SPEED, "more"),
        PEAK,
        Column("trained parameters", "{:,}".format),
    ),
    footnote="""\
The same row in each step; (ratios) are to the first row. Ours have with_flash_attention and with_chunked_loss as well.
LoRA: adapters of rank 8 on attention and experts. Speed: by the median step after the first. Peak memory: the most that
training took beyond the loaded model, gradients and the state of AdamW included.""",
    cases=(
        Case("all parameters (transformers)"),
        Case("with_full_finetuning", compose(with_full_finetuning(), LONG)),
        Case("LoRA (transformers and peft)", in_peft),
        Case("with_lora, with_mxfp4_experts", compose(with_lora(), with_mxfp4_experts(), LONG)),
    ),
    measure=measure_finetuning,
    dtype=lambda asked: "float32" if asked in (None, "float32") else "bfloat16",
)

COMPARISONS = (STACKS, EXPERTS, SHARDED, SERVING, FINETUNING)
"""All tables, in the order in which they are measured and printed."""
