"""The exact Python of a plan, and the command that starts it where there are several ranks."""

from __future__ import annotations

import json
from typing import Any

from ..model.training import CHECKPOINTING
from .hardware import Hardware
from .options import Option
from .target import Target

WIDTH = 100
"""How many characters a line may have."""


def code_of(target: Target, hardware: Hardware, option: Option, *, memory_map: bool = False) -> str:
    """Python that does what an option says, and runs as it stands; a model that is there is called `model`."""
    wrappers = [repr(wrapper) for wrapper in option.stack]
    imported = {wrapper.name for wrapper in option.stack}
    spread = hardware.count > 1
    imported |= {"init_distributed"} if spread else set()
    lines = ["init_distributed()  # joins the processes that torchrun started"] if spread else []
    if target.source is None:
        imported.add("compose")
        lines.append(_call("compose", wrappers) + "(model)")
    else:
        imported.add("load")
        arguments = [json.dumps(target.source, ensure_ascii=False), *wrappers]
        if hardware.device.kind == "cuda":
            arguments.append('device="cuda"')
        if memory_map:
            arguments.append("memory_map=True")
        lines.append(_call("load", arguments))
    lines += _after(hardware, option, imported)
    names = sorted(imported - {"torch"})
    line = f"from gptoss_opt import {', '.join(names)}"
    if len(line) > WIDTH:
        line = "\n".join(["from gptoss_opt import (", *(f"    {name}," for name in names), ")"])
    torch = ["import torch", ""] if "torch" in imported else []
    return "\n".join([*torch, line, "", *lines, ""])


def _call(function: str, arguments: list[str]) -> str:
    """What a function gives, called `model`: on one line, or with a line for each argument."""
    line = f"model = {function}({', '.join(arguments)})"
    return (
        line if len(line) <= WIDTH else "\n".join([f"model = {function}(", *(f"    {one}," for one in arguments), ")"])
    )


def _after(hardware: Hardware, option: Option, imported: set[str]) -> list[str]:
    work = option.work
    if work.task == "serve":
        imported.add("ContinuousBatcher")
        return [f"batcher = ContinuousBatcher(model, max_num_sequences={work.batch})"]
    if not work.trains:
        return []
    again = [f'model.{CHECKPOINTING}({{"use_reentrant": False}})'] if work.checkpointing and work.task == "lora" else []
    alone = hardware.count > option.held.ranks == 1
    imported |= {"torch"} if alone else set()
    parallel = ["model = torch.nn.parallel.DistributedDataParallel(model)"] if alone else []
    return ["model.train()", *again, *parallel]


def launch_of(hardware: Hardware, option: Option) -> str | None:
    """The command that starts a script with this code on all devices, or None where one process does."""
    if hardware.count == 1:
        return None
    nodes: Any = ()
    if hardware.nodes > 1:
        nodes = (f"--nnodes {hardware.nodes}", "--rdzv-backend c10d", "--rdzv-endpoint FIRST_NODE:29500")
    return " ".join(["torchrun", *nodes, f"--nproc-per-node {hardware.per_node}", "your_script.py"])
