"""What training holds beside the weights: gradients, and the state of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..distributed import local_part


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps of each parameter.

    Attributes:
        label: the optimizer, as `explain` writes it.
        values: how many values it keeps for each one of the parameter.
        value_bytes: the bytes of such a value; None if it has the dtype of the parameter.
        factored: whether of matrices it keeps one value per row and per column instead.
    """

    label: str
    values: int
    value_bytes: float | None = None
    factored: bool = False

    def num_bytes(self, parameter: Tensor) -> float:
        """The bytes that are kept of a parameter.

        Example:
            >>> OPTIMIZERS["adamw"].num_bytes(torch.empty(8, 4)), OPTIMIZERS["adafactor"].num_bytes(torch.empty(8, 4))
            (256, 48)
        """
        shape, count = parameter.shape, parameter.numel()
        if self.factored and len(shape) > 1:
            count = math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]
        return self.values * count * (self.value_bytes or parameter.element_size())

    def describe(self, dtypes: str) -> str:
        """The optimizer and what it keeps, in words."""
        if not self.values:
            return self.label
        kind = dtypes if self.value_bytes is None else f"{8 * int(self.value_bytes)} bits"
        return f"{self.label}, {'rows and columns in' if self.factored else f'{self.values} x'} {kind}"


OPTIMIZERS = {
    # torch.optim keeps states in the dtype of the parameters.
    "adamw": OptimizerState("AdamW", 2),
    # A byte per value, and a float32 scale for each block of 256 (Dettmers et al. 2022), as bitsandbytes and torchao.
    "adamw_8bit": OptimizerState("AdamW", 2, value_bytes=1 + 4 / 256),
    # Shazeer and Stern 2018, without momentum.
    "adafactor": OptimizerState("Adafactor", 1, factored=True),
    "sgd_momentum": OptimizerState("SGD with momentum", 1),
    "sgd": OptimizerState("SGD", 0),
}
"""The optimizers whose memory is known, by name."""


def training_memory(model: nn.Module, optimizer: OptimizerState) -> str:
    """Say in a sentence what training `model` holds on this rank beside activations, as it is held now."""
    parameters = list(model.parameters())
    mine = [local_part(parameter) for parameter in parameters]
    trained = [local for local, parameter in zip(mine, parameters, strict=True) if parameter.requires_grad]
    weights, gradients = _num_bytes(mine), _num_bytes(trained)
    state = sum(optimizer.num_bytes(local) for local in trained)
    dtypes = " and ".join(sorted({str(local.dtype).removeprefix("torch.") for local in trained}))
    rank = ", on this rank" if any(isinstance(parameter, DTensor) for parameter in parameters) else ""
    return (
        f"gradients {written(gradients)}, optimizer state {written(state)} ({optimizer.describe(dtypes)}): "
        f"{written(weights + gradients + state)} with the weights{rank}"
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def written(num_bytes: float) -> str:
    """A number of bytes, as people write it.

    Example:
        >>> written(13.76e9), written(4.7e6)
        ('13.76 GB', '4.70 MB')
    """
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB"
