"""When a call must be a torch operator: for autograd, and while it is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from .gate import PLAIN


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call is being traced, or its tensors stand for others: then no value and no address can be read."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return True  # modes of dispatch, such as make_fx's, see nothing but torch's operations
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in PLAIN or tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        ):
            return True
    return False


def needs_operator(*tensors: Tensor | None) -> bool:
    """Whether the call must be an operator: for autograd and tracing. Otherwise its overhead is saved."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return is_traced(*tensors)
