"""A training script as a user writes it, for one process or for torchrun: nothing in it but the wrapper is parallel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from gptoss_opt import init_distributed, shard_experts, shard_tensor_parallel, with_full_finetuning
from gptoss_opt.distributed import local as model_mesh
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import leave
from tests.helpers import ids, tiny_model

WITHOUT = " without the mean"


def wrap(model: Any, how: str) -> Any:
    if how.startswith("full"):
        model, how = with_full_finetuning(model), how.removeprefix("full").removeprefix(", ")
    if how in ("one", ""):
        return model
    if how == "tp x dp":
        mesh = init_distributed((2, 2), ("dp", "tp"), device="cpu")
        return shard_tensor_parallel(model, mesh=mesh["tp"])
    init_distributed(device="cpu")
    if how == "tp":
        return shard_tensor_parallel(model)
    if how == "tp + ep":
        return shard_experts(shard_tensor_parallel(model))
    return shard_experts(model, dispatch="all_to_all" if how == "all to all" else "all_reduce")


def main(how: str, batch_size: int, out: Path) -> None:
    real = model_mesh.mean_gradient
    if how.endswith(WITHOUT):
        model_mesh.mean_gradient = lambda x, *_: x
    try:
        train(how.removesuffix(WITHOUT), batch_size, out)
    finally:
        model_mesh.mean_gradient = real


def train(how: str, batch_size: int, out: Path) -> None:
    # In float64, so that rounding cannot make a token change its expert, after which curves part for no fault.
    model = tiny_model(torch.float64, **UNEVEN)
    model.set_experts_implementation("eager")
    model = wrap(model, how)
    tokens = ids(batch=80, length=12)
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=20,
        per_device_train_batch_size=batch_size,
        learning_rate=3e-3,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=settings, train_dataset=data)
    trainer.train()
    trainer.save_model(str(out))
    history = [row for row in trainer.state.log_history if "loss" in row]
    if trainer.args.process_index == 0:
        text = json.dumps({"loss": [row["loss"] for row in history], "norm": [row["grad_norm"] for row in history]})
        (out / "history.json").write_text(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *hows = sys.argv[1:]
    for one in hows:
        name, _, size = one.partition(":")
        main(name, int(size), Path(folder, name))
    leave()
