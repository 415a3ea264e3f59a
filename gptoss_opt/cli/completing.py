"""What `run` does: prompts are completed by a batcher, and written as they come."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from ..finetune.recipe import tokenizer_of
from ..serve import pieces

CODE = """\
from transformers import AutoTokenizer

from gptoss_opt import ContinuousBatcher, optimize

model = {optimize}
tokenizer = AutoTokenizer.from_pretrained({source})
prompts = {prompts}
with ContinuousBatcher(model, max_num_sequences={batch}) as batcher:
    requests = [
        batcher.submit(
            {prompt},
            {options},
        )
        for prompt in prompts
    ]
    for request in requests:
        print(tokenizer.decode(request.result(), skip_special_tokens=True))
"""
CHAT = """tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )"""
PLAIN = "tokenizer(prompt)"


def prompts_of(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, or the lines of a file, or of standard input, without empty ones.

    Raises:
        ValueError: there is none, or the file cannot be read.
    """
    if given:
        found = given
    elif file is not None:
        try:
            found = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}). Give a text file with a prompt in each line."
            ) from error
    else:
        found = sys.stdin.read().splitlines()
    if not (prompts := [one for one in found if one.strip()]):
        raise ValueError("there is no prompt. Give some, or --file FILE, or lines on standard input.")
    return prompts


def complete(model: Any, source: str, prompts: list[str], *, raw: bool, as_json: bool, **options: Any) -> None:
    """Complete all prompts at once, and write each one's text: one alone as it comes, several in their order."""
    from .. import ContinuousBatcher

    tokenizer = tokenizer_of(source)
    with ContinuousBatcher(model, max_num_sequences=len(prompts)) as batcher:
        requests: list[Any] = []
        try:
            requests += (batcher.submit(_encoded(tokenizer, one, raw), **options) for one in prompts)
            for prompt, request in zip(prompts, requests, strict=True):
                if not as_json and len(prompts) > 1:
                    typer.echo(f"> {prompt}")
                _write(tokenizer, prompt, request, as_json)
        finally:
            # Those that go on, because something went wrong or the user has stopped it, are not waited for.
            for request in requests:
                request.cancel()


def _write(tokenizer: Any, prompt: str, request: Any, as_json: bool) -> None:
    if as_json:
        text = tokenizer.decode(request.result(), skip_special_tokens=True)
        row = {"prompt": prompt, "text": text, "tokens": request.tokens, "finish_reason": request.finish_reason}
        typer.echo(json.dumps(row))
        return
    for piece in pieces(tokenizer, request):
        typer.echo(piece, nl=False)
    typer.echo()


def _encoded(tokenizer: Any, prompt: str, raw: bool) -> Any:
    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
