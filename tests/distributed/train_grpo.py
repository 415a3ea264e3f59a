"""GRPO by TRL as a user writes it, for torchrun: completions by the batcher or by transformers. See `test_rollouts`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from gptoss_opt import Rollouts, init_distributed, shard_tensor_parallel, with_flash_attention, with_mxfp4_experts
from tests.distributed.ranks import leave
from tests.train.rollouts import GROUP, curves, grpo, with_same_numbers
from tests.train.twins import adapted, values


def trained(how: str, folder: Path) -> dict[str, Any]:
    """The curves, and what the adapters are at the end; each rank has a group of its own."""
    model = adapted()
    if how == "sharded":
        init_distributed(device="cpu")
        shard_tensor_parallel(model)
    if how == "transformers":
        trainer = grpo(with_same_numbers(model), folder, per_device_train_batch_size=GROUP)
    else:
        with_mxfp4_experts(with_flash_attention(model))
        trainer = grpo(model, folder, rollouts=Rollouts(), per_device_train_batch_size=GROUP)
    try:
        found: dict[str, Any] = curves(trainer, "grpo")
    except ValueError as error:
        return {"refused": str(error)}
    found["adapters"] = [value.flatten().tolist() for name, value in values(model).items() if "lora_" in name]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    out, *hows = sys.argv[1:]
    distributed.init_process_group("gloo")
    for one in hows:
        found = trained(one, Path(out, "trainer"))
        Path(out, f"{one} {distributed.get_rank()}.json").write_text(json.dumps(found))
    leave()
