"""The loop of `finetune`: the calls of this library, step by step, with a log, checkpoints and a way to stop."""

from __future__ import annotations

import functools
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checkpoint import load, save_adapter
from ..model.training import CHECKPOINTING
from ..train import load_adapter
from .data import Row, batches, pack, read_documents, steps_per_pass
from .interrupt import Interrupt
from .options import FinetuneError, Options
from .recipe import built, config_of, device_of, learning_rate, tokenizer_of, wrappers_of
from .report import PICTURE, Summary, draw, peak_memory, speed
from .run_folder import STATE, RunFolder, sha256_of

LORA_CODE = """\
from gptoss_opt import export, load, load_adapter
model = load_adapter(load({model!r}), {checkpoint!r})  # merge_lora(model) folds it into the weights
export(model, {whole!r}, format="bf16")  # one checkpoint, merged, that others load"""

FULL_CODE = """\
from gptoss_opt import export, load
model = load({checkpoint!r})
export(model, {whole!r})  # experts packed as MXFP4, all else in bfloat16, as released"""


def finetune(options: Options, *, resume: bool = False) -> Summary:
    """Finetune a checkpoint on a file of rows, with adapters or in full, in this process.

    The folder `options.output` gets `run.json`, `log.jsonl`, a checkpoint `step-000100` every `save_every` steps, of
    which the last two stay, and `loss.png`. A checkpoint holds the adapter as peft has it, or the whole model, the
    tokenizer, and what is needed to go on.

    Args:
        options: see `settle`.
        resume: go on from the last checkpoint there; the losses are those of a run that was never interrupted.

    Raises:
        FinetuneError: something is missing or does not fit, or rows cannot be trained on (`DataError`); then nothing
            was written. Or the loss is no number, or a checkpoint could not be written.
        CheckpointError: there is no such checkpoint, or a damaged one.
        CompatibilityError: the wrappers do not go on this model or device.
    """
    _refuse_ranks()
    run = RunFolder(Path(options.output))
    config = config_of(options)
    wrappers, tokenizer = built(wrappers_of(options, config)), tokenizer_of(options.model)
    rows = pack(
        read_documents(options.data, tokenizer, max_length=options.max_length, truncate=options.truncate),
        context=options.context,
    )
    _check_tokens(rows, config.vocab_size, options.model)
    data_sha256 = sha256_of(options.data)
    run.check(options, data_sha256, resume=resume)
    checkpoint = next(reversed(run.checkpoints().values()), None) if resume else None
    run.begin(options, data_sha256)
    torch.manual_seed(options.seed)
    model = _loaded(options, wrappers, checkpoint)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], weight_decay=options.weight_decay
    )
    done = _restore(optimizer, checkpoint / STATE, model.device) if checkpoint else 0
    run.forget(done)
    num_steps = options.steps or (options.epochs or 1) * steps_per_pass(rows, options.rows_per_step)
    order = batches(rows, options.rows_per_step, num_steps=num_steps, seed=options.seed, first=done)
    taken: list[Mapping[str, Any]] = []
    with tqdm(total=num_steps, initial=done, desc="finetuning", unit="step") as bar, Interrupt() as interrupt:
        for step, batch in enumerate(order, done + 1):
            rate = learning_rate(step - 1, num_steps, highest=options.lr, warmup=options.warmup)
            taken.append({"step": step, "learning_rate": rate, **train_step(model, optimizer, batch, rate, options)})
            run.log(taken[-1])
            memory = taken[-1]["peak_memory"] / 1e9
            bar.set_postfix_str(f"loss {taken[-1]['loss']:.3f}, {speed(taken):,.0f} tokens/s, peak {memory:.2f} GB")
            bar.update()
            if interrupt.asked or step == num_steps or step % options.save_every == 0:
                write = functools.partial(_write, model, optimizer, tokenizer, options.method, step)
                checkpoint = run.save(step, write)
            if interrupt.asked:
                break
    assert checkpoint is not None
    records = tuple(run.records())
    picture = draw([record["loss"] for record in records], run.path / PICTURE)
    code = (LORA_CODE if options.method == "lora" else FULL_CODE).format(
        model=options.model, checkpoint=str(checkpoint), whole=str(run.path / "whole")
    )
    again = f"python -m gptoss_opt finetune --resume --output {shlex.quote(options.output)}"
    return Summary(records, checkpoint, num_steps, code, picture, again)


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: Sequence[Row], rate: float, options: Options
) -> dict[str, Any]:
    """Take one step on some rows, whose loss is the mean over all that is learnt in them; returns what the log says."""
    begun, loss = time.perf_counter(), 0.0
    num_labels = sum(row.num_labels for row in batch)
    try:
        for row in batch:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=options.autocast):
                part = model(**row.inputs(model.device), num_items_in_batch=num_labels, use_cache=False).loss
            part.backward()
            loss += part.item()
    except torch.OutOfMemoryError as error:
        raise FinetuneError(
            f"out of memory, in a row of {row.num_tokens} tokens ({error}). Use a shorter --context, as rows are "
            "computed one at a time, --gradient-checkpointing, or --method lora."
        ) from error
    (group,) = optimizer.param_groups
    norm = torch.nn.utils.clip_grad_norm_(group["params"], options.clip).item()
    if not torch.tensor([loss, norm]).isfinite().all():
        raise FinetuneError(
            f"the loss is {loss} and the norm of its gradients {norm}. Use a lower --lr, and see whether the data hold "
            "what they should; --resume with the same --lr would come here again."
        )
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": loss,
        "grad_norm": norm,
        "tokens": sum(row.num_tokens for row in batch),
        "labels": num_labels,
        "seconds": time.perf_counter() - begun,
        "peak_memory": peak_memory(model.device),
    }


def _refuse_ranks() -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise FinetuneError(
            f"this runs in one process, and torchrun has started {ranks}. For several, write a script with the "
            "library: docs/full_finetuning.md and docs/tensor_parallelism.md show DDP, FSDP2, Trainer and sharding. "
            "--show-code prints a script to begin with."
        )


def _check_tokens(rows: Sequence[Row], vocab_size: int, model: str) -> None:
    highest = max(int(document.tokens.max()) for row in rows for document in row.documents)
    if highest >= vocab_size:
        raise FinetuneError(
            f"the tokenizer of {model} gives the token {highest}, and its model has {vocab_size}. Give the tokenizer "
            "that belongs to this model."
        )


def _loaded(options: Options, wrappers: Sequence[Any], checkpoint: Path | None) -> Any:
    """The model with its wrappers, in training mode, as it was at a checkpoint if there is one."""
    whole = str(checkpoint) if checkpoint and options.method == "full" else options.model
    model = load(whole, *wrappers, device=device_of(options), dtype=options.dtype).train()
    if checkpoint and options.method == "lora":
        load_adapter(model, checkpoint)
    if options.gradient_checkpointing:
        getattr(model, CHECKPOINTING)({"use_reentrant": False})
    return model


def _write(model: Any, optimizer: torch.optim.Optimizer, tokenizer: Any, method: str, step: int, folder: Path) -> None:
    """Fill a checkpoint: adapter or model, tokenizer, and what is needed to go on."""
    if method == "lora":
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = {"step": step, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    if model.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(model.device)
    torch.save(state, folder / STATE)


def _restore(optimizer: torch.optim.Optimizer, file: Path, device: torch.device) -> int:
    """Put an optimizer and the generators back to where they were at a checkpoint; returns the number of its step."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    return int(state["step"])
