"""The options of `finetune`: from a command line, from a file, and what they are if nobody says."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

Kind = Callable[[Any], Any]
"""Takes what was given, as text or as a value of a file, and gives the value. Raises `argparse.ArgumentTypeError`."""


class FinetuneError(ValueError):
    """The finetuning cannot run; the message is for the user."""


def whole(minimum: int) -> Kind:
    """Whole numbers of at least `minimum`."""

    def convert(value: Any) -> int:
        found = int(value) if isinstance(value, str) and value.isdecimal() else value
        if type(found) is not int or found < minimum:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number of at least {minimum}")
        return found

    return convert


def number(low: float, high: float = math.inf, *, above: bool = False) -> Kind:
    """Numbers from `low`, or with `above` from above it, to `high`."""

    def convert(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not (low < found if above else low <= found) or not found <= high or math.isinf(found):
            between = f"{'above' if above else 'of at least'} {low:g}" + (
                f", at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{value!r} is not a number {between}")
        return found

    return convert


def one_of(*names: str) -> Kind:
    """One of some names."""

    def convert(value: Any) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(names)}")
        return str(value)

    return convert


def text(value: Any) -> str:
    """Any text."""
    if not isinstance(value, str) or not value:
        raise argparse.ArgumentTypeError(f"{value!r} is not a text")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise argparse.ArgumentTypeError(f"{value!r} is not true or false")
    return value


def _option(kind: Kind, default: Any, meaning: str, metavar: str = "N", **more: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "help": meaning, "metavar": metavar, **more})


METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"lr": 2e-4, "dtype": "bfloat16"},
    "full": {"lr": 1e-5, "dtype": "float32"},
}
"""The methods, and what their defaults are where they have different ones."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a finetuning is told. Made by `settle`, which checks it.

    The fields are the options of the command line, and `adapter`, the JSON of a peft.LoraConfig. Those that are `free`
    may be others when a run goes on; all else makes the run what it is.
    """

    model: str = _option(text, "", "a folder with a GPT-OSS checkpoint and its tokenizer, or a hub id", "DIR_OR_ID")
    data: str = _option(text, "", "a file with one JSON object in each line", "FILE.jsonl", free=True)
    method: str = _option(
        one_of(*METHODS), "lora", "lora: adapters; full: all parameters (default: lora)", "{lora,full}"
    )
    output: str = _option(text, "finetuned", "the folder for what is learnt (default: finetuned)", "DIR", free=True)
    rank: int | None = _option(whole(1), None, "of the adapters (default: 8)", of="lora")
    alpha: float | None = _option(
        number(0, above=True), None, "adapters are scaled by alpha/rank (default: 16)", of="lora"
    )
    dropout: float | None = _option(number(0, 0.999), None, "before the adapters (default: 0)", "P", of="lora")
    targets: tuple[str, ...] | None = _option(
        text,
        None,
        "the weights that get adapters (default: all of attention and experts)",
        "NAME",
        of="lora",
        many=True,
    )
    context: int = _option(whole(2), 2048, "tokens of a packed row (default: 2048)")
    max_length: int = _option(whole(2), None, "tokens that a document may have (default: those of a row)")
    truncate: bool = _option(flag, False, "cut longer documents rather than refuse them", "")
    batch_tokens: int = _option(whole(2), None, "tokens of a step, in rows one after the other (default: four rows)")
    epochs: int | None = _option(whole(1), None, "how often to go over the data (default: 1)")
    steps: int | None = _option(whole(1), None, "how many steps to take instead")
    lr: float = _option(
        number(0, above=True), None, "highest learning rate (default: 2e-4 for lora, 1e-5 for full)", "X"
    )
    warmup: float = _option(number(0, 1), 0.03, "the part of the steps in which it rises to that (default: 0.03)", "X")
    weight_decay: float = _option(number(0), 0.0, "of AdamW (default: 0)", "X")
    clip: float = _option(number(0, above=True), 1.0, "the highest norm of all gradients together (default: 1)", "X")
    seed: int = _option(whole(0), 0, "of the order of rows and of dropout (default: 0)")
    dtype: str = _option(
        one_of("bfloat16", "float32"),
        None,
        "of weights (default: bfloat16 for lora, float32 for full)",
        "{bfloat16,float32}",
    )
    autocast: bool = _option(flag, False, "compute in bfloat16, whatever the dtype of the weights is", "")
    gradient_checkpointing: bool = _option(
        flag, False, "layers keep their input alone and are computed again (always with full)", "", of="lora"
    )
    device: str | None = _option(text, None, "such as cuda or cpu (default: a GPU if there is one)", "NAME", free=True)
    save_every: int = _option(whole(1), 100, "steps between checkpoints (default: 100)", free=True)
    adapter: Mapping[str, Any] | None = field(default=None, metadata={})

    @property
    def rows_per_step(self) -> int:
        """How many packed rows a step has."""
        return self.batch_tokens // self.context


OPTIONS: Mapping[str, Field[Any]] = {one.name: one for one in fields(Options) if one.metadata}
"""The options that have a name on the command line and in a file."""
FREE = {name for name, one in OPTIONS.items() if one.metadata.get("free")}
"""What may be another when a run goes on."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser all options, and one for a file of them. Its namespace holds what is on the command line alone."""
    parser.add_argument("--config", metavar="FILE", help="options in TOML or JSON, or the JSON of a peft.LoraConfig")
    for name, one in OPTIONS.items():
        more: dict[str, Any] = {"type": one.metadata["kind"], "metavar": one.metadata["metavar"]}
        if one.metadata["kind"] is flag:
            more = {"action": "store_true"}
        elif one.metadata.get("many"):
            more["nargs"] = "+"
        parser.add_argument(_flag(name), help=one.metadata["help"], default=argparse.SUPPRESS, **more)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options that a file says: names as on the command line, in TOML or JSON, or the JSON of a peft.LoraConfig.

    Raises:
        FinetuneError: it cannot be read, or has keys that are not known or values that cannot be.
    """
    file = Path(path)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FinetuneError(f"{file} cannot be read ({error}). Give a file in TOML or JSON.") from error
    try:
        found = _parsed_toml(file, content) if file.suffix == ".toml" else json.loads(content)
    except ValueError as error:
        if isinstance(error, FinetuneError):
            raise
        raise FinetuneError(f"{file} is not {file.suffix[1:].upper() or 'JSON'} ({error}). Correct it.") from error
    if not isinstance(found, dict):
        raise FinetuneError(f"{file} holds no object of names and values. Correct it.")
    if "peft_type" in found:
        return {"adapter": found}
    given = {name.replace("-", "_"): value for name, value in found.items()}
    if unknown := [name for name in given if name not in OPTIONS]:
        known = ", ".join(OPTIONS)
        raise FinetuneError(
            f"{file}: there is no option {', '.join(map(repr, unknown))}. Known are {known}; the JSON of a "
            "peft.LoraConfig is known by its peft_type."
        )
    return {name: _converted(file, name, value) for name, value in given.items()}


def _parsed_toml(file: Path, content: str) -> Any:
    if sys.version_info < (3, 11):
        raise FinetuneError(f"{file}: Python reads TOML from 3.11 on. Write the same names and values as JSON.")
    import tomllib

    return tomllib.loads(content)


def _converted(file: Path, name: str, value: Any) -> Any:
    kind = OPTIONS[name].metadata["kind"]
    try:
        if OPTIONS[name].metadata.get("many"):
            return tuple(map(kind, value if isinstance(value, list) else [value]))
        return kind(value)
    except argparse.ArgumentTypeError as error:
        raise FinetuneError(f"{file}: {name}: {error}.") from error


def settle(given: Mapping[str, Any]) -> Options:
    """The options of a run, from those that were given.

    Raises:
        FinetuneError: something is missing, or two do not fit together; all problems are named.

    Example:
        >>> settle({"model": "gpt-oss-20b", "data": "chats.jsonl", "method": "full"}).lr
        1e-05
    """
    method = given.get("method", "lora")
    context = given.get("context", Options.context)
    by_default = {**METHODS[method], "max_length": context, "batch_tokens": 4 * context}
    listed = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    options = Options(**{**by_default, **given, **listed})
    problems = [f"{_flag(name)} is needed." for name in ("model", "data") if not getattr(options, name)]
    for name, one in OPTIONS.items():
        if one.metadata.get("of", method) != method and getattr(options, name) not in (None, False):
            problems.append(f"{_flag(name)} is for --method {one.metadata['of']}, and the method is {method}.")
    if options.adapter is not None and method != "lora":
        problems.append(f"the config is that of adapters, and the method is {method}.")
    if options.max_length > context:
        problems.append(f"--max-length {options.max_length} does not fit into rows of --context {context} tokens.")
    if not options.rows_per_step:
        problems.append(f"--batch-tokens {options.batch_tokens} is less than one row of --context {context} tokens.")
    if options.steps is not None and options.epochs is not None:
        problems.append("--steps and --epochs say the same: give one of them.")
    if problems:
        raise FinetuneError(" ".join(problems))
    return options
