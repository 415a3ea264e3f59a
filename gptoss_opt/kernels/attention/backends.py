"""The backends of attention, in order of preference, and what each of them needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from ..native import why_no_attention
from . import tiled, varlen
from .impl import native
from .impl.flash_attn import FLASH_ATTN_2, FLASH_ATTN_3, FlashAttn4
from .impl.torch_cpu import TorchCpu
from .impl.torch_cuda import TorchEfficient, TorchFlash
from .visible import Rules

HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float64, torch.float32, *HALF)


@dataclass(frozen=True)
class AttentionRequest:
    """What a backend must serve: where, in which dtype, and for which head size."""

    device_type: str
    dtype: torch.dtype
    head_dim: int


class SinkKernel(NamedTuple):
    """Attention with sinks by one kernel: `tiled.forward` and `tiled.backward`, or those of `varlen`, bound to it."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _tiles(kernel: tiled.TileKernel) -> SinkKernel:
    return SinkKernel(partial(tiled.forward, kernel), partial(tiled.backward, kernel))


def _packs(kernel: varlen.VarlenKernel) -> SinkKernel:
    return SinkKernel(partial(varlen.forward, kernel, EFFICIENT), partial(varlen.backward, kernel, EFFICIENT))


EFFICIENT = TorchEfficient()
CPU, CUDA, CUDA_FLASH = _tiles(TorchCpu()), _tiles(EFFICIENT), _packs(TorchFlash())


def _native(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    return (native if native.serves(q, k, v, rules) else CPU).forward(q, k, v, sinks, rules)


CPU_NATIVE = SinkKernel(_native, CPU.backward)


@dataclass(frozen=True)
class FlashAttnPackage:
    """A flash-attn package: CUDA, half precision.

    Attributes:
        distribution, module: what is installed, and what is imported.
        min_version: the first version whose functions we know.
        capabilities: the major compute capabilities it runs on.
        dtypes: the dtypes it takes.
    """

    name: str
    distribution: str
    module: str
    min_version: str
    capabilities: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    kernel: SinkKernel
    only_named: bool = False

    def why_not(self, request: AttentionRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        if request.device_type != "cuda":
            return f"needs CUDA, and the model is on {request.device_type}"
        if request.dtype not in self.dtypes:
            return f"takes {' and '.join(map(str, self.dtypes))}, and the model is in {request.dtype}"
        if request.head_dim % 8 or request.head_dim > 256:
            return f"needs a head_dim that is a multiple of 8, up to 256, not {request.head_dim}"
        # A name below "flash_attn" belongs to whichever of the packages is installed, so ask for the distribution.
        try:
            version = metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return f"the package {self.distribution} is not installed"
        if Version(version) < Version(self.min_version):
            return f"needs {self.distribution} {self.min_version} or newer, not {version}"
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return f"{self.distribution} {version} has no module {self.module}"
        major, _ = torch.cuda.get_device_capability()
        if major not in self.capabilities:
            return f"does not run on a GPU of compute capability {major}.x"
        return None

    def kernel_for(self, q: Tensor) -> SinkKernel:
        """The same kernel for all queries."""
        return self.kernel


class Torch:
    """torch's own kernels: the CPU flash kernel by tiles; on CUDA the flash kernel, and by tiles the efficient one."""

    name = "torch"
    only_named = False

    def why_not(self, request: AttentionRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        if request.device_type not in ("cpu", "cuda", "meta"):
            return f"has no flash kernel that gives its log-sum-exp on {request.device_type}"
        if request.device_type == "cuda" and torch.version.hip:
            return "lays out its log-sum-exp differently on ROCm"
        if request.dtype not in FLOATING or (request.device_type, request.dtype) == ("cuda", torch.float64):
            return f"has no flash kernel for {request.dtype} on {request.device_type}"
        return None

    def kernel_for(self, q: Tensor) -> SinkKernel:
        """The flash kernel on CUDA for the queries that it takes, and the efficient one for the others."""
        if q.device.type == "cpu":
            return CPU
        if q.dtype not in HALF or q.shape[-1] % 8 or q.shape[-1] > 256:
            return CUDA
        return CUDA_FLASH if torch.cuda.get_device_capability(q.device)[0] >= 8 else CUDA


class Native(Torch):
    """The native library on a CPU, for what `impl.native.serves` says; torch's kernels for all else."""

    name = "native"

    def why_not(self, request: AttentionRequest) -> str | None:
        """The reason why it cannot serve, or None."""
        return why_no_attention(request.device_type, request.dtype, request.head_dim)

    def kernel_for(self, q: Tensor) -> SinkKernel:
        """The native kernel, which leaves to torch's what it does not take; torch's on another device than a CPU."""
        return CPU_NATIVE if q.device.type == "cpu" else super().kernel_for(q)


class Reference:
    """Plain matrix products, quadratic memory: defines the semantics, and is differentiated by autograd."""

    name = "reference"
    only_named = True

    def why_not(self, request: AttentionRequest) -> str | None:
        """None: it runs everywhere."""
        return None


BACKENDS = (
    FlashAttnPackage("fa4", "flash-attn-4", "flash_attn.cute", "4.0.0b1", (9, 10, 11), HALF[:1], _packs(FlashAttn4())),
    FlashAttnPackage("fa3", "flash-attn-3", "flash_attn_interface", "3.0.0b1", (9,), HALF, _packs(FLASH_ATTN_3)),
    FlashAttnPackage("fa2", "flash-attn", "flash_attn", "2.7.1", (8, 9, 10, 11, 12), HALF, _packs(FLASH_ATTN_2)),
    Native(),
    Torch(),
    Reference(),
)

KERNELS = {one.name: one.kernel_for for one in BACKENDS if not isinstance(one, Reference)}
"""By name, what finds the kernel for given queries; of all backends but the reference, which has no backward."""
