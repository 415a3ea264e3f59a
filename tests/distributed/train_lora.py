"""A training script with adapters as a user writes it, for torchrun or accelerate launch: see `test_lora_training`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from transformers import Trainer, TrainingArguments

from gptoss_opt import init_distributed, shard_experts, shard_tensor_parallel
from tests.distributed.models import UNEVEN
from tests.distributed.ranks import leave
from tests.helpers import ids
from tests.train.twins import adapted, plain

BATCH, STEPS = 4, 6
SHARED = {"tp": shard_tensor_parallel, "ep": shard_experts}
"""Where the ranks share a batch; elsewhere each has its part."""


def model_for(how: str) -> Any:
    model = adapted(plain(**UNEVEN))
    if how in SHARED:
        init_distributed(device="cpu")
        SHARED[how](model)
    return model


def by_trainer(how: str, out: Path, num_ranks: int) -> dict[str, list[float]]:
    """Train, come back to the checkpoint in the middle, which counts as the best, and save that."""
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH if how in SHARED else BATCH // num_ranks,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
        save_steps=STEPS // 2,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids(batch=8, length=12)]
    trainer = Trainer(model=model_for(how), args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(out / "adapter"))
    names = {"loss": "loss", "norm": "grad_norm", "evaluated": "eval_loss"}
    return {name: [row[key] for row in trainer.state.log_history if key in row] for name, key in names.items()}


def by_accelerate(out: Path, *, apart: bool) -> dict[str, list[float]]:
    """A loop of one's own, in which each rank may learn apart from the others."""
    accelerator = Accelerator(cpu=True)
    model = adapted(plain(**UNEVEN)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loader = torch.utils.data.DataLoader(ids(batch=8, length=12), batch_size=BATCH // accelerator.num_processes)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2), loader)
    found: dict[str, list[float]] = {"loss": [], "norm": []}
    for _ in range(STEPS // 2):
        for rows in loader:
            loss: Tensor = (model if apart else prepared)(rows, labels=rows).loss
            accelerator.backward(loss)
            found["norm"].append(float(accelerator.clip_grad_norm_(trained, 0.5)))
            optimizer.step()
            optimizer.zero_grad()
            found["loss"].append(float(accelerator.reduce(loss.detach(), "mean")))
    # As accelerate's documentation has it.
    main = accelerator.is_main_process
    accelerator.unwrap_model(prepared).save_pretrained(
        out / "adapter", is_main_process=main, save_function=accelerator.save
    )
    return found


def main(how: str, out: Path, rank: int = 0, num_ranks: int = 1) -> None:
    by_itself = how.startswith("accelerate")
    found = by_accelerate(out, apart=how.endswith("apart")) if by_itself else by_trainer(how, out, num_ranks)
    if rank == 0:
        (out / "history.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *hows = sys.argv[1:]
    distributed.init_process_group("gloo")
    for one in hows:
        main(one, Path(folder, one), distributed.get_rank(), distributed.get_world_size())
    leave()
