"""The script that says in calls of this library what a finetuning does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..model.training import CHECKPOINTING
from . import data, recipe
from .options import Options

SCRIPT = '''\
"""What `python -m gptoss_opt finetune` does, but for its log, its checkpoints on the way, and --resume."""
import torch
from transformers import AutoTokenizer

{imports}
from {data} import batches, pack, read_documents, steps_per_pass
from {recipe} import learning_rate

tokenizer = AutoTokenizer.from_pretrained({model!r})
documents = read_documents({data_file!r}, tokenizer, max_length={max_length}, truncate={truncate})
rows = pack(documents, context={context})
num_steps = {num_steps}

torch.manual_seed({seed})
model = load(
    {model!r},
{stack}
    device={device!r},
    dtype=torch.{dtype},
).train()
{after_loading}trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, weight_decay={weight_decay!r})
for step, batch in enumerate(batches(rows, {rows_per_step}, num_steps=num_steps, seed={seed})):
    num_labels, loss = sum(row.num_labels for row in batch), 0.0
    for row in batch:
        with torch.autocast({device_type!r}, torch.bfloat16, enabled={autocast}):
            part = model(**row.inputs(model.device), num_items_in_batch=num_labels, use_cache=False).loss
        part.backward()
        loss += part.item()
    torch.nn.utils.clip_grad_norm_(trained, {clip!r})
    optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, highest={lr!r}, warmup={warmup!r})
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {{step + 1}}: loss {{loss:.4f}}")
{save}
tokenizer.save_pretrained({output!r})
'''

CHECKPOINTED = f'model.{CHECKPOINTING}({{"use_reentrant": False}})\n'


def script(options: Options) -> str:
    """Python that does what `finetune` does with these options, with the same losses.

    Raises:
        CheckpointError: there is no checkpoint.
        FinetuneError: an option cannot be.
    """
    calls = recipe.wrappers_of(options, recipe.config_of(options))
    recipe.built(calls)
    device, lora = recipe.device_of(options), options.method == "lora"
    save = f"save_adapter(model, {options.output!r})" if lora else f"model.save_pretrained({options.output!r})"
    names = sorted({"load", *(call.__name__ for call, _ in calls)} | ({"save_adapter"} if lora else set()))
    values: Mapping[str, Any] = {
        **vars(options),
        "imports": f"from {__name__.partition('.')[0]} import {', '.join(names)}",
        "data": data.__name__,
        "recipe": recipe.__name__,
        "data_file": options.data,
        "num_steps": options.steps or f"{options.epochs or 1} * steps_per_pass(rows, {options.rows_per_step})",
        "stack": "\n".join(f"    {call.__name__}({_arguments(given)})," for call, given in calls),
        "device": device,
        "device_type": torch.device(device).type,
        "rows_per_step": options.rows_per_step,
        "after_loading": CHECKPOINTED if options.gradient_checkpointing else "",
        "save": save,
    }
    return SCRIPT.format(**values)


def _arguments(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())
