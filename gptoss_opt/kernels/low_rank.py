"""Low-rank changes of weights (LoRA, Hu et al. 2021): `scale * B A` beside W, which is never made.

Legend: r the rank, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from . import transforms
from .native.low_rank import add_from_rank, add_gradients, serves, to_rank
from .tracing import is_traced


@dataclass(frozen=True)
class LowRank:
    """A change of a weight: the product with x gets `scale * dropout(x) A^T B^T` more.

    Attributes:
        a: `[r, in]`, or `[E, r, in]` for the weights of E experts; any floating dtype.
        b: `[out, r]`, or `[E, out, r]`.
        scale: what the change is multiplied by.
        dropout: the probability with which a value of x is left out of the change; 0 where nothing is trained.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and `scale * B` in the dtype in which they are multiplied."""
        wide = self.b.to(torch.promote_types(self.b.dtype, dtype))
        return self.a.to(dtype), (wide * self.scale).to(dtype)

    def expert(self, index: int) -> LowRank:
        """The change of the weights of one expert."""
        return LowRank(self.a[index], self.b[index], self.scale, self.dropout)

    def hidden(self, x: Tensor) -> Tensor:
        """`x` [..., in] through A: [..., r]."""
        return functional.linear(dropped(x, self.dropout), self.a.to(x.dtype))

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` [..., out] plus what the change adds for `x` [..., in].

        Example:
            >>> LowRank(torch.ones(1, 4), torch.ones(3, 1), scale=0.5).added_to(torch.zeros(2, 3), torch.ones(2, 4))
            tensor([[2., 2., 2.],
                    [2., 2., 2.]])
        """
        x = dropped(x, self.dropout)
        rows, to = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if _by_native(x, y, self.a, self.b):
            a, b = self.factors(torch.float32)
            return cast(Tensor, _Added.apply(to, rows, a[None], b.mT.contiguous()[None])).view(y.shape)
        a, b = self.factors(x.dtype)
        return _added(to, rows, a, b.T).view(y.shape)

    def delta(self) -> Tensor:
        """The change of the weight itself, `[..., out, in]` in float32 or float64, for merging."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        a, b = self.factors(dtype)
        return b @ a


def _by_native(x: Tensor, y: Tensor, *factors: Tensor) -> bool:
    """Whether the native library computes what a change adds: torch's products with such narrow factors are slow."""
    if is_traced(x, y, *factors) or transforms.active():
        return False
    return serves(x, x.shape[-1]) and serves(y, y.shape[-1])


def _added(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y` [N, out] plus `x` [N, in] through A [r, in] and B transposed [r, out]."""
    hidden = functional.linear(x, a)
    return torch.addmm(y, hidden, b.to(hidden.dtype))


class _Added(torch.autograd.Function):
    """`y` [N, out] plus `x` [N, in] through A [1, r, in] and B transposed [1, r, out], on a CPU; factors in float32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out, all_rows = y.clone(memory_format=torch.contiguous_format), torch.tensor([len(x)], dtype=torch.int32)
        hidden = to_rank(x, all_rows, a)
        add_from_rank(out, all_rows, hidden, b)
        of_factors = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if of_factors else None, hidden if of_factors else None, a, b, all_rows)
        ctx.like = x.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, all_rows = ctx.saved_tensors
        d_y, (of_y, of_x, of_a, of_b) = grads[0].contiguous(), ctx.needs_input_grad
        shape, dtype = ctx.like
        if torch.is_grad_enabled():  # it is to be differentiated again
            # Without x neither factor takes a gradient, and that of x does not depend on it.
            x = d_y.new_zeros(shape, dtype=dtype) if x is None else x
            inputs = [one if one.requires_grad else one.detach().requires_grad_() for one in (x, a, b)]
            plain = _added(torch.zeros_like(d_y), inputs[0], *(one[0].to(dtype) for one in inputs[1:]))
            return d_y, *torch.autograd.grad(plain, inputs, d_y, create_graph=True)
        d_x = d_y.new_zeros(shape, dtype=dtype) if of_x else None
        factors = add_gradients(d_y, d_x, all_rows, (a, b), x, hidden, wanted=(of_a, of_b))
        return d_y if of_y else None, d_x, *factors


def dropped(x: Tensor, probability: float) -> Tensor:
    """`x` with values left out at random, and the others scaled up.

    The random numbers are those of a generator of its own, for which one number is drawn from torch's on the CPU: so
    ranks that began alike go on alike, however many rows each of them has.
    """
    if not probability:
        return x
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return functional.dropout(x, probability)
    generator = torch.Generator(x.device).manual_seed(int(torch.randint(2**62, (), device="cpu")))
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability, generator=generator)
    return x * kept / (1 - probability)
