"""Parameters that hold codes: bytes that stand for numbers, and are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ARITHMETIC = frozenset(
    (
        *("abs", "add", "addcdiv", "addcmul", "addmm", "bmm", "clamp", "cumsum", "div", "exp", "floor_divide", "lerp"),
        *("log", "log_softmax", "matmul", "mean", "mm", "mul", "multiply", "neg", "norm", "pow", "reciprocal", "relu"),
        *("round", "sigmoid", "softmax", "sqrt", "std", "sub", "subtract", "sum", "tanh", "true_divide", "truediv"),
        *("iadd", "imul", "isub", "itruediv", "radd", "rmul", "rsub", "rtruediv", "var"),
    )
)
"""What would make other numbers of codes, by the names that torch has for it, without the underscores around."""


def refuse_arithmetic(name: str) -> None:
    """Raise `ValueError` if the function of torch that has this name would make other numbers of codes."""
    name = name.strip("_").removeprefix("foreach_")
    if name in ARITHMETIC:
        raise ValueError(  # a TypeError would get lost in torch's operators
            f"{name} was called on packed weights, whose bytes are codes of MXFP4, and no numbers. Leave out what is "
            "not floating point: to average a model, give AveragedModel a multi_avg_fn that skips it (it gets the "
            "tensors of one dtype at a time)."
        )


class Codes(nn.Parameter):
    """A parameter of codes, as one process holds it. It is frozen, and whoever does arithmetic on it is told."""

    def requires_grad_(self, requires_grad: bool = True) -> Codes:
        """Stay frozen: `model.requires_grad_(True)` is about all else."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What a state dict holds is saved as any tensor is, for those who read it without this package.
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(Tensor)
            return plain.__reduce_ex__(protocol) if "detached" in self.__dict__ else (_parameter, (plain.detach(),))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        refuse_arithmetic(name)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if name in ("detach", "clone"):
                result = result.as_subclass(cls)
                result.detached = True
            return result


def _parameter(plain: Tensor) -> Codes:
    return Codes(plain, requires_grad=False)
