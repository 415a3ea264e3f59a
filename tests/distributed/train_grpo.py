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
    """The curves, and a few values of the adapters at the end."""
    model = adapted()
    rollouts = None if "transformers" in how else Rollouts()
    if rollouts is None:
        with_same_numbers(model)
    else:
        with_mxfp4_experts(with_flash_attention(model))
    if "shared" in how:
        init_distributed(device="cpu")
        shard_tensor_parallel(model)
    # Each rank has a group of its own, or all ranks have the same.
    size = 2 * GROUP if "shared" in how else GROUP
    trainer = grpo(model, folder, rollouts=rollouts, per_device_train_batch_size=size)
    found: dict[str, Any] = curves(trainer, "grpo")
    found["adapters"] = [float(v.sum()) for name, v in values(model).items() if "lora_B" in name and "shared" not in how]
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
