"""The command line: `python -m gptoss_opt`, and `gptoss-opt` once installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import BackendError, CheckpointError, CompatibilityError, __version__
from .finetune.options import FinetuneError, add_options, read_config, settle

DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments (by default the program's own), and return the exit code.

    0: done. 1: the demo found a difference above its tolerance. 2: wrong arguments, or a model or data that cannot be
    used. 130: stopped by Ctrl-C.
    """
    args = parser().parse_args(argv)
    return int(args.run(args))


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="gptoss_opt", description="Wrappers for Hugging Face GPT-OSS models.")
    top.add_argument("--version", action="version", version=f"gptoss_opt {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="measure a model in eager attention and with the wrappers",
        description="Generate and take a training step in eager attention and with each wrapper, decode, serve, "
        "fine-tune, and compare. Exits with 1 if a wrapper changes the model's results.",
    )
    demo.add_argument(
        "--model", metavar="DIR_OR_ID", help="a folder or a Hugging Face hub id (default: a small random checkpoint)"
    )
    demo.add_argument(
        "--lengths", type=_whole_number(2), nargs="+", metavar="N", help="prompt lengths in tokens (default: 1024 2048)"
    )
    demo.add_argument(
        "--new-tokens", type=_whole_number(1), metavar="N", help="how many tokens to generate (default: 16)"
    )
    demo.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: float32, or with --model auto, the dtype of the files)",
    )
    demo.add_argument("--threads", type=_whole_number(1), metavar="N", help="CPU threads (default: torch's own choice)")
    demo.add_argument("--ranks", type=_whole_number(2), metavar="N", help="shard the model over N processes as well")
    demo.set_defaults(run=_demo)

    finetune = commands.add_parser(
        "finetune",
        help="train adapters, or all parameters, on a file of rows",
        description="Train adapters or all parameters of a checkpoint on JSON lines: chats, texts, or prompts with "
        "completions. Rows are all checked before training starts. Ctrl-C saves.",
    )
    add_options(finetune)
    finetune.add_argument("--resume", action="store_true", help="go on with the run in --output, with its options")
    finetune.add_argument("--show-code", action="store_true", help="print a script that does the same, and do nothing")
    finetune.set_defaults(run=_finetune)
    return top


def _whole_number(minimum: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return convert


def _demo(args: argparse.Namespace) -> int:
    from .demo import DemoError, run_demo

    given = {name: value for name, value in vars(args).items() if name not in ("run", "model") and value is not None}
    try:
        report = run_demo(args.model, **given)
    except (DemoError, CompatibilityError, BackendError) as error:
        print(f"gptoss_opt demo: {error}", file=sys.stderr)
        return 2
    print(report)
    return 1 if report.problems else 0


def _finetune(args: argparse.Namespace) -> int:
    from .finetune.loop import finetune
    from .finetune.run_folder import continued
    from .finetune.script import script

    given = {name: value for name, value in vars(args).items() if name not in ("run", "config", "resume", "show_code")}
    try:
        given = {**(read_config(args.config) if args.config else {}), **given}
        options = settle(continued(given) if args.resume else given)
        if args.show_code:
            print(script(options), end="")
            return 0
        summary = finetune(options, resume=args.resume)
    except (FinetuneError, CheckpointError, CompatibilityError, BackendError) as error:
        print(f"gptoss_opt finetune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gptoss_opt finetune: stopped. What was saved before is there, and nothing since.", file=sys.stderr)
        return 130
    print(summary)
    return 0 if summary.finished else 130
