"""Each part of a model beside its plain computation, of what the part was given while the model ran.

Every function that takes a module gathers its whole parameters once, if ranks hold parts of them; all ranks go through
the parts in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributed import with_whole_parameters
from ..model.implementations import implementation_of
from ..model.plain import (
    plain_attention,
    plain_embedding,
    plain_experts,
    plain_head,
    plain_norm,
    plain_rotary,
    plain_router,
)
from .compare import by_others, compared, differentiated, wide
from .drift import Drift, epsilon, share_of
from .probe import Call, Calls, first_tensor


@dataclass(frozen=True)
class Recorded:
    """What the parts of a model were given and gave, and how they are compared.

    Attributes:
        seen: bool [B, T]; False is padding.
        whole: the calls in one forward.
        stepped: those of attention and experts while the last tokens were decoded.
        others: by part, the other backends that are tried.
        gradients: whether gradients are compared.
    """

    seen: Tensor
    whole: Calls
    stepped: Calls
    others: dict[str, list[str]]
    gradients: bool

    def attention(self, layer: int, module: Any) -> Iterator[Drift]:
        """Attention, forward, decoding, by other backends, and differentiated if asked for."""
        call, name, seen = self.whole[module][-1], implementation_of(module.config, "attention"), self.seen
        plain = with_whole_parameters(module, partial(plain_attention, module))

        def exact(places: tuple[Tensor, Tensor], hidden: Tensor) -> Tensor:
            return plain(hidden, places, seen)[seen]

        def again(hidden: Tensor) -> Tensor:
            return first_tensor(module(**{**call.kwargs, "hidden_states": hidden}))[seen]

        hidden, as_given = call.kwargs["hidden_states"], partial(exact, call.kwargs["position_embeddings"])
        yield compared("attention", layer, name, "forward", first_tensor(call.out)[seen], hidden, as_given)
        calls = self.stepped[module]
        together = torch.cat([one.kwargs["hidden_states"] for one in calls], 1)
        cos, sin = (
            torch.cat([one.kwargs["position_embeddings"][which].expand(len(seen), -1, -1) for one in calls], 1)
            for which in (0, 1)
        )
        out = torch.cat([first_tensor(one.out) for one in calls], 1)[seen]
        yield compared("attention", layer, name, "decoding", out, together, partial(exact, (cos, sin)))
        if self.gradients:
            yield differentiated("attention", layer, name, again, hidden, as_given)
        others = self.others["attention"]
        yield from by_others("attention", layer, module.config, others, again, hidden, as_given, self.gradients)

    def norm(self, layer: int | None, module: Any) -> Drift:
        """A norm, in float32 whatever the dtype is, as transformers computes it."""
        out, hidden = self.whole[module][-1].out, self.whole[module][-1].args[0]
        plain = with_whole_parameters(module, partial(plain_norm, module))
        low, exact = plain(hidden.float()), plain(hidden.double())
        share = share_of(out, low.to(out.dtype), exact, max(epsilon(out.dtype), epsilon(torch.float32)))
        return Drift("norm", layer, "the model", "forward", *share)

    def router(self, layer: int, module: Any) -> Iterator[Drift]:
        """The router's logits, its weights of the experts that it has chosen, and its choice."""
        call = self.whole[module][-1]
        (logits, weights, chosen), hidden = call.out, call.args[0]
        plain = with_whole_parameters(module, partial(plain_router, module))
        yield compared("router", layer, "the model", "forward", logits, hidden, plain)

        def shares(hidden: Tensor) -> Tensor:
            return plain(hidden).gather(-1, chosen).softmax(-1)

        yield compared("router's weights", layer, "the model", "forward", weights, hidden, shares)
        exact, low = plain(hidden.to(wide(hidden.dtype))), plain(hidden)
        # A tie may fall otherwise, but not by more than rounding explains.
        behind = exact.topk(chosen.shape[-1]).values[..., -1] - exact.gather(-1, chosen).amin(-1)
        allowed = 4 * ((low - exact).abs().amax() + epsilon(hidden.dtype) * exact.abs().amax())
        share = float(behind.amax().clamp(min=0) / allowed.clamp(min=1e-30))
        yield Drift("router's choice", layer, "the model", "forward", share, "worst value")

    def experts(self, layer: int, module: Any) -> Iterator[Drift]:
        """The experts, forward, decoding, by other backends, and differentiated if asked for."""
        call, step, name = self.whole[module][-1], self.stepped[module][-1], implementation_of(module.config, "experts")
        plain = with_whole_parameters(module, partial(plain_experts, module))

        def exact(call: Call, hidden: Tensor) -> Tensor:
            return plain(hidden, *call.args[1:3])

        def again(hidden: Tensor) -> Tensor:
            return first_tensor(module(hidden, *call.args[1:3]))

        hidden, as_given = call.args[0], partial(exact, call)
        yield compared("experts", layer, name, "forward", first_tensor(call.out), hidden, as_given)
        yield compared("experts", layer, name, "decoding", first_tensor(step.out), step.args[0], partial(exact, step))
        if self.gradients:
            yield differentiated("experts", layer, name, again, hidden, as_given)
        others = self.others["experts"]
        yield from by_others("experts", layer, module.config, others, again, hidden, as_given, self.gradients)

    def embedding(self, module: Any) -> Drift:
        """The embedding of the tokens."""
        call = self.whole[module][-1]
        plain = with_whole_parameters(module, partial(plain_embedding, module, call.args[0]))
        exact, low = plain(wide(call.out.dtype)), plain(call.out.dtype)
        share = share_of(call.out, low, exact, epsilon(call.out.dtype))
        return Drift("embedding", None, "the model", "forward", *share)

    def rotary(self, module: Any) -> Drift:
        """The cosines and sines of the positions."""
        call = self.whole[module][-1]
        places = call.args[1] if len(call.args) > 1 else call.kwargs["position_ids"]
        found = torch.cat(call.out, -1)
        low, exact = (plain_rotary(module, places.to(dtype)) for dtype in (torch.float32, torch.float64))
        share = share_of(found, low.to(found.dtype), exact, max(epsilon(found.dtype), epsilon(torch.float32)))
        return Drift("rotary embedding", None, "the model", "forward", *share)

    def head(self, model: Any) -> Drift:
        """The logits."""
        head = model.get_output_embeddings()
        call, plain = self.whole[head][-1], with_whole_parameters(head, partial(plain_head, model))
        return compared("head", None, "the model", "forward", call.out, call.args[0], plain)
