"""The commands whose options are argparse's: `demo` and `finetune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from .. import BackendError, CheckpointError, CompatibilityError
from ..finetune.options import FinetuneError, add_options, read_config, settle

DTYPES = ("auto", "float32", "bfloat16", "float16")
STOPPED = 130
"""The exit code after Ctrl-C."""


def demo_parser() -> argparse.ArgumentParser:
    """The parser of `demo`."""
    demo = argparse.ArgumentParser(
        prog="gptoss-opt demo",
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
    return demo


def finetune_parser() -> argparse.ArgumentParser:
    """The parser of `finetune`."""
    finetune = argparse.ArgumentParser(
        prog="gptoss-opt finetune",
        description="Train adapters or all parameters of a checkpoint on JSON lines: chats, texts, or prompts with "
        "completions. Rows are all checked before training starts. Ctrl-C saves.",
    )
    add_options(finetune)
    finetune.add_argument("--resume", action="store_true", help="go on with the run in --output, with its options")
    finetune.add_argument("--show-code", action="store_true", help="print a script that does the same, and do nothing")
    return finetune


def _whole_number(minimum: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return convert


def demo(arguments: list[str]) -> int:
    """Run `demo`, and return the exit code: 1 if a wrapper changes results."""
    from ..demo import DemoError, run_demo

    args = demo_parser().parse_args(arguments)
    given = {name: value for name, value in vars(args).items() if name != "model" and value is not None}
    try:
        report = run_demo(args.model, **given)
    except (DemoError, CompatibilityError, BackendError) as error:
        print(f"gptoss_opt demo: {error}", file=sys.stderr)
        return 2
    print(report)
    return 1 if report.problems else 0


def finetune(arguments: list[str]) -> int:
    """Run `finetune`, and return the exit code."""
    from ..finetune.loop import finetune
    from ..finetune.run_folder import continued
    from ..finetune.script import script

    args = finetune_parser().parse_args(arguments)
    given = {name: value for name, value in vars(args).items() if name not in ("config", "resume", "show_code")}
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
        return STOPPED
    print(summary)
    return 0 if summary.finished else STOPPED
