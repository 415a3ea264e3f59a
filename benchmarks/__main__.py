"""Run benchmarks: all that `make bench` runs, or one of them by name.

Each verifies what it measures, prints tables and, if all of its cases ran, writes results/NAME-PROCESSOR.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from dataclasses import fields, replace

from benchmarks.case import Settings, run

BENCHMARKS = {
    "attention": "attention with sinks, beside transformers' eager attention",
    "experts": "one expert layer of the 20b, packed and dense, beside transformers' implementations",
    "plan": "plans beside what processes hold and do: memory of stacks, and decoding",
    "monitor": "what with_monitor costs, in decoding and in training",
    "tune": "linear layers and experts, natively and by torch: the table of which kernel computes when",
    "load": "`load` of a packed checkpoint of the 20b's shapes (--layers N; --full: all of them, and generate)",
    "parallel": "sharded models on two processes, beside transformers' expert parallelism (--layers N)",
    "batching": "continuous batching, beside vLLM and transformers",
    "evaluation": "log-likelihoods after many examples, beside the lm-evaluation-harness's own HFLM (--questions N)",
    "finetune": "LoRA on attention and experts, beside transformers and peft",
    "rollouts": "completions of one step of GRPO on the model that is trained, beside transformers' generate",
    "one_gpu": "the whole 20b on one GPU: one user, and many requests at once, beside transformers",
    "whole": "a whole model for one user: decoding and a prompt, beside transformers, llama.cpp and vLLM",
    "mapped": "a packed checkpoint read and mapped: first token, memory, decoding",
    "packing": "packing the experts of a dense layer of the 20b",
    "loss": "head and loss over the vocabulary, beside transformers and torch's linear_cross_entropy",
    "frames": "how many Python frames of the package a forward, a training step and a serving step enter",
    "layout": "how long it takes to compute the layouts of the released models",
    "watch": "how long a batcher takes to notice whether the weights have changed",
}
BY_DEFAULT = ("attention", "experts", "tune", "load", "parallel", "batching", "finetune")


def parser_for(settings: Settings, *, add_help: bool = True) -> argparse.ArgumentParser:
    """The parser of these settings, whose values are the defaults."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        epilog="\n".join(["benchmarks:", *(f"  {name:10} {about}" for name, about in BENCHMARKS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=add_help,
    )
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, help=f"if left out: {', '.join(BY_DEFAULT)}")
    for field in fields(settings):
        default = getattr(settings, field.name)
        if isinstance(default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            metavar = {"only": "CASE", "folder": "FOLDER"}.get(field.name, "N")
            parser.add_argument(f"--{field.name}", type=type(default), default=default, metavar=metavar)
    return parser


def main() -> None:
    """Run the benchmark that the command line names, or one after the other, each in a process of its own."""
    arguments = sys.argv[1:]
    # What else can be set depends on the name.
    name = parser_for(Settings(), add_help=False).parse_known_args(arguments)[0].name
    module = importlib.import_module(f"benchmarks.{name}") if name else None
    settings: Settings = module.SETTINGS if module else Settings()
    options = vars(parser_for(settings).parse_args(arguments))
    del options["name"]
    if module:
        run(name, replace(settings, **options), module.cases, getattr(module, "conclude", None))
        return
    for each in BY_DEFAULT:
        subprocess.run([sys.executable, "-m", "benchmarks", each, *arguments], check=True)


if __name__ == "__main__":
    main()
