"""`with_mxfp4_experts`: expert weights stay packed, in memory, in computation and on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..core import Attachment, Choice, Host, Phase, Report, Wrapper, check_name, choose, held_by, takes_model
from ..kernels.experts import PACKED_BACKENDS
from ..layout import MXFP4, Held, Layout
from ..model.experts import (
    EXPERT_WEIGHTS,
    EXPERTS,
    expert_parameters,
    experts_request,
    fill_experts,
    keep_packed,
    why_no_packing,
)
from ..model.host import GPT_OSS


@dataclass(frozen=True, kw_only=True, repr=False)
class Mxfp4Experts(Wrapper):
    """What `with_mxfp4_experts` builds. Options: `backend`."""

    backend: str = "auto"

    name: ClassVar[str] = "with_mxfp4_experts"
    phase: ClassVar[Phase] = Phase.LAYOUT
    host: ClassVar[Host] = GPT_OSS
    claims: ClassVar[tuple[str, ...]] = (EXPERT_WEIGHTS, EXPERTS)
    provides: ClassVar[tuple[str, ...]] = ("packed experts",)

    def __post_init__(self) -> None:
        check_name(PACKED_BACKENDS, self.backend, self.name)

    def check(self, model: nn.Module) -> Iterable[str]:
        return why_no_packing(model)

    def choice(self, model: nn.Module) -> Choice:
        return choose(PACKED_BACKENDS, experts_request(model), self.backend, self.name)

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        return layout.store(expert_parameters(model), MXFP4.name)

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        keep_packed(model, journal)
        return Report((*_packing(held_by(model)), *fill_experts(model, journal)))


def _packing(held: dict[str, Held]) -> list[str]:
    lossy: dict[str, list[str]] = {}
    packed = {parameter: how for parameter, how in held.items() if how.form.storage == MXFP4.name}
    for parameter, how in packed.items():
        path, _, name = parameter.rpartition(".")
        if how.sqnr < math.inf:
            lossy.setdefault(path, []).append(f"{name} {how.sqnr:.1f} dB")
    exact = sum(how.sqnr == math.inf for how in packed.values())
    lines = [f"{exact} expert weights packed as MXFP4, exactly"] if exact else []
    return lines + [f"{path} packed as MXFP4, SQNR: {', '.join(values)}" for path, values in lossy.items()]


@takes_model
def with_mxfp4_experts(*, backend: str = "auto") -> Mxfp4Experts:
    """Expert weights as MXFP4, 4.25 bits each, in memory, in computation and on disk. On CPU and GPU.

    Replaces `gate_up_proj` and `down_proj` of every layer's experts by `..._blocks`, uint8 `[E, out, in / 32, 16]`, and
    `..._scales`, uint8 `[E, out, in / 32]`, as in the released checkpoints: frozen parameters of the same module.
    Values that came from MXFP4 stay as they are, bit for bit; others are rounded (OCP Microscaling Formats v1.0,
    nearest, ties to even), and `explain` reports the signal-to-quantisation-noise ratio per layer. Differentiable in
    all but the packed weights. `save_pretrained` writes the released format. `undo` gives dense weights again, with
    the packed values. To load a checkpoint without unpacking it first: `load(path, with_mxfp4_experts())`.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a
            wrapper to give to `compose` or `load`.
        backend: "auto", or one by name, which then never falls back:
            "triton": CUDA; bfloat16, float16 and float32.
            "native": CPU, a library in C; bfloat16 and float32. Built when gptoss_opt is installed.
            "reference": plain torch, dequantising one expert at a time; defines the semantics, runs everywhere.

    Raises:
        CompatibilityError: not a GPT-OSS model, packed or quantised already, sizes that are no multiples of 32, or
            a backend that cannot serve here.
        BackendError: no backend has that name.
        ValueError: a weight is infinite or NaN.

    Example:
        >>> model = with_mxfp4_experts(model)
        >>> model.model.layers[0].mlp.experts.gate_up_proj_blocks.shape
        torch.Size([4, 128, 2, 16])
        >>> model.generate(input_ids, max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 11])
    """
    return Mxfp4Experts(backend=backend)
