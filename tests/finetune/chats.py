"""A small checkpoint with a tokenizer, whose chat template does what that of the released checkpoints does."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gptoss_opt.testing import Size, random_checkpoint

SPECIAL = ("<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|endoftext|>")
SIZE = Size(2, 64, 64, 4, 2, 4, 2, 16, 128, 8, 126, 105, 104)
"""A checkpoint with a vocabulary for `tokenizer`, and its end and padding tokens."""

# As the released one: messages of roles that it does not know are left out without a word; the last turn of the
# assistant ends with another token than those before it, and alone keeps what was thought.
TEMPLATE = """\
<|start|>system<|message|>identity<|end|>
{%- if tools %}<|start|>developer<|message|>{{ tools | length }} tools<|end|>{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {%- if message.content and '<|' in message.content %}{{ raise_exception('no tags, please') }}{% endif %}
    {%- if message.tool_calls %}
        {{- '<|start|>assistant to=' + message.tool_calls[0].name + '<|call|>' }}
    {%- elif loop.last and not add_generation_prompt %}
        {%- if message.thinking %}{{- '<|start|>assistant~<|message|>' + message.thinking + '<|end|>' }}{% endif %}
        {{- '<|start|>assistant!<|message|>' + message.content + '<|return|>' }}
    {%- else %}
        {{- '<|start|>assistant!<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- elif message.role in ('user', 'system') or (message.role == 'developer' and loop.first) %}
    {{- '<|start|>' + message.role + '<|message|>' + message.content | trim + '<|end|>' }}
{%- elif message.role == 'tool' %}
    {{- '<|start|>tool<|message|>' + message.content | tojson + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

MARKED = """\
{%- for message in messages %}<|start|>{{ message.role }}
{%- if message.role == 'assistant' -%}
    {% generation %}{{ '!<|message|>' + message.content + '<|end|>' }}{% endgeneration %}
{%- else %}{{ '<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}"""
"""A template that marks what the assistant says."""


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token for each printable character of ASCII, and none for any other."""
    characters = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(string.printable)}, merges=[]))
    characters.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[:4]),
    )
    made.chat_template = template
    return made


def checkpoint(path: Path) -> Path:
    """Write a random checkpoint, packed as MXFP4, with the tokenizer."""
    folder = random_checkpoint(path, SIZE)
    tokenizer().save_pretrained(folder)
    return folder


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}
