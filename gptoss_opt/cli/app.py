"""All commands, on typer: each is one or two calls of the library, which `--show-code` prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..planner import RELEASED_AT
from . import arguments, completing, serving, show, stacks

DONE, NO, MISTAKE = 0, 1, 2
"""Exit codes: done; the answer is no; the user's mistake."""

app = typer.Typer(
    name="gptoss-opt",
    help="Wrappers that make a Hugging Face GPT-OSS model fast and small, and keep it the same model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of commands that read their arguments themselves."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments (by default the program's own), and return the exit code.

    0: done. 1: the answer is no: a plan that does not fit, a model that is not right or could not be measured, a demo
    with a difference.
    2: wrong arguments, or a model, data or machine that cannot be used. 130: stopped by Ctrl-C.
    """
    try:
        app(None if argv is None else list(argv), prog_name="gptoss-opt")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else MISTAKE if left.code else DONE
    except KeyboardInterrupt:
        print("gptoss-opt: stopped.", file=sys.stderr)
        return arguments.STOPPED
    return DONE


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gptoss_opt {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """The options of all commands."""


class Task(str, Enum):
    """What a plan is for."""

    generate = "generate"
    serve = "serve"
    lora = "lora"
    full = "full"


class Objective(str, Enum):
    """What is preferred of all that fits."""

    fit = "fit"
    latency = "latency"
    throughput = "throughput"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a name on the hub, or 20b or 120b.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ShowCode = Annotated[bool, typer.Option("--show-code", help="Print Python that does the same, and do nothing.")]


def _answered(call: Callable[[], Any], code: str, show_code: bool) -> Any:
    """What a call of the library gives; or its code, printed. A user's mistake is a sentence, and exit code 2."""
    if show_code:
        typer.echo(code)
        raise typer.Exit
    try:
        return call()
    except show.mistakes() as error:
        typer.echo(f"gptoss-opt: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(MISTAKE) from error


@app.command()
def plan(
    model: Model,
    hardware: Annotated[
        str | None, typer.Option(help="Such as 2x24GB, 1xH200, cpu:24GB or '2x(8xH100)'; this machine if left out.")
    ] = None,
    task: Annotated[Task, typer.Option(help="What is done.")] = Task.generate,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    objective: Annotated[Objective, typer.Option(help="What is preferred of all that fits.")] = Objective.fit,
    json: Json = False,
    show_code: ShowCode = False,
) -> None:
    """Choose wrappers for a model, a machine and a task; exits with 1 if it does not fit."""
    from .. import plan

    given = {"hardware": hardware, "task": task.value, "context": context, "batch": batch, "objective": objective.value}
    code = show.call("plan", [model], given, plan)
    found = _answered(lambda: plan(model, **given), f"from gptoss_opt import plan\n\nprint({code})", show_code)  # type: ignore[arg-type]
    show.answer(found, [found.title, found.verdict], found.tables, [*found.notes, found.script], json)
    raise typer.Exit(DONE if found.fits else NO)


@app.command()
def run(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT ...", help="Else lines of --file, or of standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="With one prompt in each line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its completion.")] = 4096,
    raw: Annotated[bool, typer.Option("--raw", help="Prompts are not put into the chat template.")] = False,
    json: Json = False,
    show_code: ShowCode = False,
) -> None:
    """Complete prompts, all at once by continuous batching; one alone is written as it comes."""
    from .. import optimize

    drawn: dict[str, Any] = {"temperature": temperature} if temperature else {"do_sample": False}
    options = {"max_new_tokens": max_new_tokens, **drawn}

    def answer() -> None:
        texts = completing.prompts_of(prompts, file)
        made = optimize(model, task="serve", context=context, batch=len(texts))
        completing.complete(made, made.plan.source, texts, raw=raw, as_json=json, **options)

    code = ""
    if show_code:
        texts = _answered(lambda: completing.prompts_of(prompts, file), "", False)
        planned = {"task": "serve", "context": context, "batch": len(texts)}
        code = completing.CODE.format(
            optimize=show.call("optimize", [model], planned),
            source=show.written(RELEASED_AT.get(model, model)),
            prompts=show.written(texts),
            batch=len(texts),
            prompt=completing.PLAIN if raw else completing.CHAT,
            options=", ".join(f"{name}={value!r}" for name, value in options.items()),
        )
    _answered(answer, code, show_code)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a prompt and its completion.")] = 4096,
    max_num_sequences: Annotated[int, typer.Option(min=1, help="Completions that are made at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Completions that may wait; more are refused (429).")] = 256,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=serving.API_KEY, help="What clients must send.", show_envvar=True)
    ] = None,
    harmony: Annotated[
        bool | None,
        typer.Option(
            "--harmony/--no-harmony",
            help="Whether openai-harmony tells thoughts from answers.",
            show_default="where it is installed",
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests may take to finish after SIGTERM or Ctrl-C.")
    ] = 30.0,
    show_code: ShowCode = False,
) -> None:
    """Serve a model as OpenAI's API does, until SIGTERM or Ctrl-C."""
    planned = {"task": "serve", "context": context, "batch": max_num_sequences}
    options = {
        "host": host,
        "port": port,
        "shutdown_timeout": shutdown_timeout,
        "name": name or serving.name_of(model),
        "context": context,
        "max_num_sequences": max_num_sequences,
        "max_waiting": max_waiting,
        "harmony": harmony,
    }
    code = serving.code(model, planned, options, with_key=api_key is not None)
    _answered(lambda: serving.serve(model, planned, {**options, "api_key": api_key}), code, show_code)


@app.command()
def verify(
    model: Model,
    context: Annotated[int, typer.Option(min=8, help="Of the plan that the wrappers come from.")] = 512,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients too.")] = False,
    json: Json = False,
    show_code: ShowCode = False,
) -> None:
    """Load a model as planned, and compare every part with plain eager computations; exits with 1 if one is wrong."""
    from .. import optimize, verify

    code = (
        f"from gptoss_opt import optimize, verify\n\n{show.call('model = optimize', [model], {'context': context})}\n"
        f"print({show.call('verify', [], {'gradients': gradients}, verify, first='model')})"
    )
    found = _answered(lambda: verify(optimize(model, context=context), gradients=gradients), code, show_code)
    show.answer(found, [found.title, found.verdict], [found.table], [], json)
    raise typer.Exit(DONE if found.right else NO)


@app.command()
def bench(
    model: Model,
    wrapper: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Such as with_flash_attention; once for each of several.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are decoded after it.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that each takes; the median counts.")] = 3,
    json: Json = False,
    show_code: ShowCode = False,
) -> None:
    """Measure a model with wrappers (the plan's, if none is named) on this machine, beside transformers and the limit.

    It is verified first; exits with 1 if it is wrong.
    """
    from .. import bench

    stack = _answered(lambda: stacks.named(wrapper), "", False) if wrapper else None
    sizes = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats}
    names = sorted({"bench", *(["compose", *(one.name for one in stack)] if stack else [])})
    called = show.call("bench", [model, *([stack] if stack else [])], sizes, bench)
    code = f"from gptoss_opt import {', '.join(names)}\n\nprint({called})"
    found = _answered(lambda: bench(model, stack, **sizes), code, show_code)
    show.answer(found, [found.title, found.verdict], found.tables, [], json)
    raise typer.Exit(DONE if found.right else NO)


@app.command()
def doctor(json: Json = False, show_code: ShowCode = False) -> None:
    """Say what is installed, which devices there are, and which backend serves which kernel and why not the others."""
    from .. import doctor

    found = _answered(doctor, "from gptoss_opt import doctor\n\nprint(doctor())", show_code)
    show.answer(found, [found.verdict], found.tables, [], json)


@app.command(context_settings=PASSED_ON, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Measure a model in eager attention and with the wrappers."""
    raise typer.Exit(arguments.demo(context.args))


@app.command(context_settings=PASSED_ON, add_help_option=False)
def finetune(context: typer.Context) -> None:
    """Train adapters, or all parameters, on a file of rows."""
    raise typer.Exit(arguments.finetune(context.args))
