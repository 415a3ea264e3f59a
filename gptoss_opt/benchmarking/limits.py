"""The rates that a machine allows at most, by the planner's rooflines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..planner import Device, Hardware
from ..planner.hardware import product_rate, read_rate
from ..planner.parameters import Parameters
from ..planner.speed import ALL_OF_IT, Rate, speed_of
from ..planner.workload import Workload


def limits_of(config: Any, held: Parameters, hardware: Hardware, *, prompt: int, new_tokens: int) -> Mapping[str, Rate]:
    """Tokens a second of one sequence, by "decode" and "prefill", if all of a device's rates were reached.

    What must be read, and computed, is counted by the planner (`gptoss_opt.planner.speed`).

    Args:
        config: of the model.
        held: its parameters, as they are stored.
        hardware: one device, whose rates are the limits.
        prompt, new_tokens: tokens of the sequence; in decoding, half of the new ones are there on average.

    Example:
        >>> from gptoss_opt import compose
        >>> from gptoss_opt.planner import described
        >>> from gptoss_opt.planner.parameters import parameters_of
        >>> held = parameters_of(model, compose())
        >>> limits_of(model.config, held, described("cpu:24GB"), prompt=8, new_tokens=2)["decode"].bound
        'memory bandwidth'
    """
    # The planner counts half of a context, which is there on average if all of it is decoded. Here the prompt was read.
    contexts = {"decode": 2 * prompt + new_tokens, "prefill": prompt}
    return {
        what: speed_of(config, held, Workload(context=context), hardware, ALL_OF_IT)[what]
        for what, context in contexts.items()
    }


def measured_again(device: Device) -> Device:
    """A CPU with the best of its rates, those it had and those it has now: others may be at work on it. A GPU as it is.

    Example:
        >>> from gptoss_opt.planner import described
        >>> slow = described("cpu:24GB").device
        >>> measured_again(slow).bandwidth >= slow.bandwidth
        True
    """
    if device.kind != "cpu":
        return device
    threads = torch.get_num_threads()
    # Not as they are remembered.
    bandwidth, flops = read_rate.__wrapped__(threads), product_rate.__wrapped__(threads)
    return replace(device, bandwidth=max(device.bandwidth, bandwidth), flops=max(device.flops, flops))
