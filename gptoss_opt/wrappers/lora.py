"""`with_lora`: low-rank adapters beside frozen weights, experts included, on dense and packed ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..checkpoint.adapter import save_pretrained
from ..core import Attachment, Choice, Filler, Host, Phase, Report, Wrapper, choose, layout_of, mesh_of, takes_model
from ..kernels.experts import DENSE_BACKENDS
from ..layout import Layout, require
from ..model.adapters import (
    Adapter,
    AdapterState,
    Place,
    draw_alike,
    is_named,
    keep_size,
    of_pattern,
    places,
    set_adapters,
    train_only,
    why_no_adapters,
    why_no_pattern,
    why_not_named,
    why_tied,
)
from ..model.experts import EXPERTS, experts_request, fill_experts_if_served, why_experts_stay, why_no_experts
from ..model.gradients import keep_gradients
from ..model.host import GPT_OSS
from ..model.modules import decoder_path
from ..model.peft_config import options_of
from ..model.saving import SAVING
from ..model.training import TRAINED, why_offloaded

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
DTYPES = ("float32", "bfloat16", "float16", "float64")
Patterns = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class Lora(Wrapper):
    """What `with_lora` builds. Options: those of `with_lora`, and `rank_pattern` and `alpha_pattern` of a peft config.

    Patterns are pairs of the end of a name and what holds for weights of that name.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str | tuple[str, ...] = TARGETS
    layers: tuple[int, ...] | None = None
    dtype: str = "float32"
    rslora: bool = False
    train: tuple[str, ...] = ()
    rank_pattern: Patterns = ()
    alpha_pattern: Patterns = ()

    name: ClassVar[str] = "with_lora"
    phase: ClassVar[Phase] = Phase.ADAPT
    host: ClassVar[Host] = GPT_OSS
    claims: ClassVar[tuple[str, ...]] = (TRAINED, SAVING)
    # transformers' own computation of the experts knows of no adapters.
    defaults: ClassVar[Mapping[str, Filler]] = {EXPERTS: fill_experts_if_served}

    def __post_init__(self) -> None:
        for problem in self._wrong():
            raise ValueError(f"{self.name}: {problem}")

    def _wrong(self) -> Iterable[str]:
        for name, rank in (("rank", self.rank), *self.rank_pattern):
            if type(rank) is not int or rank < 1:
                yield f"{name} is {rank!r}. Give a whole number of at least 1."
        for name, alpha in (("alpha", self.alpha), *self.alpha_pattern):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                yield f"{name} is {alpha!r}. Give a number above 0."
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            yield f"dropout is {self.dropout!r}. Give a probability from 0 up to, and without, 1."
        for name in ("targets", "train"):
            if not isinstance(given := getattr(self, name), tuple | str) or not all(isinstance(n, str) for n in given):
                yield f"{name} is {given!r}. Give names, such as {name}={('router' if name == 'train' else 'q_proj',)}."
        if not self.targets:
            yield f"targets is empty. Give names of weights, such as {', '.join(TARGETS)}."
        if self.layers is not None and (not self.layers or any(type(number) is not int for number in self.layers)):
            yield f"layers is {self.layers!r}. Give numbers of layers, such as layers=(0, 1), or leave it out."
        regular = [name for name, _ in (*self.rank_pattern, *self.alpha_pattern)]
        for pattern in (*regular, *([self.targets] if isinstance(self.targets, str) else ())):
            if problem := why_no_pattern(pattern):
                yield problem
        if self.dtype not in DTYPES:
            yield f"dtype is {self.dtype!r}. Use one of {', '.join(f'torch.{name}' for name in DTYPES)}."

    def adapted(self, model: nn.Module) -> dict[Place, tuple[int, Adapter]]:
        """The weights that get an adapter, with its rank and how it counts."""
        found: dict[Place, tuple[int, Adapter]] = {}
        for place in places(model):
            in_full = isinstance(self.targets, tuple) and place.name in self.targets  # as peft reads it
            chosen = self.layers is None or place.layer in self.layers or in_full
            if chosen and (is_named(place.name, self.targets) or is_named(place.weight, self.targets)):
                rank = int(of_pattern(place.key, self.rank_pattern) or self.rank)
                alpha = of_pattern(place.key, self.alpha_pattern) or self.alpha
                found[place] = rank, Adapter(alpha / (rank**0.5 if self.rslora else rank), self.dropout)
        return found

    def check(self, model: nn.Module) -> Iterable[str]:
        yield from (*why_no_adapters(model), *why_offloaded(model))
        adapted = self.adapted(model)
        if any(place.of_experts for place in adapted):
            yield from (*why_no_experts(model), *why_experts_stay(model))
        unmatched = [*self._unmatched(model, adapted)]
        yield from unmatched
        if not adapted and not unmatched:
            yield f"no weight in the layers {self.layers} is named by targets={self.targets!r}. Give other layers."
        yield from why_tied(model, adapted)
        yield from why_not_named(model, self.train)

    def _unmatched(self, model: nn.Module, adapted: Mapping[Place, Any]) -> Iterable[str]:
        every = list(places(model))
        known = ", ".join(sorted({place.name.rpartition(".")[2] for place in every}))
        numbers = {place.layer for place in every} - {None}
        if missing := [number for number in self.layers or () if number not in numbers]:
            yield f"there is no layer {missing[0]}. Give some of 0 to {len(numbers) - 1}."
        for target in (self.targets,) if isinstance(self.targets, str) else self.targets:
            by = target if isinstance(self.targets, str) else [target]
            if not any(is_named(name, by) for place in every for name in (place.name, place.weight)):
                yield f"{target!r} is the name of no weight that can have an adapter. Known are {known}."
        for name in [name for name, _ in (*self.rank_pattern, *self.alpha_pattern)]:
            if not any(of_pattern(place.key, [(name, 1)]) for place in adapted):
                yield f"the pattern {name!r} fits no weight that gets an adapter. Correct it, or leave it out."

    def choice(self, model: nn.Module) -> Choice | None:
        if next(why_no_experts(model), None):
            return None
        return choose(DENSE_BACKENDS, experts_request(model), "auto", self.name)

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        dtype, adapted = getattr(torch, self.dtype), self.adapted(model)
        require(why_tied(model, adapted))
        for place, (rank, _) in adapted.items():
            shapes = place.shapes(layout.form(place.weight).shape, rank)
            for name, shape, dims, init in zip(
                place.factors, shapes, place.dims_along(), ("kaiming_uniform", "zeros"), strict=True
            ):
                layout = layout.add(name, shape, init=init, dtype=dtype, beside=place.weight, dims=dims)
        return layout

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        adapted, first = self.adapted(model), journal.state is None
        state = journal.state = journal.state or AdapterState()
        set_adapters(model, {place: adapter for place, (_, adapter) in adapted.items()}, state.switch, journal)
        trained = train_only(model, self.train, layout_of(model).new, journal)
        keep_gradients(model, journal)
        keep_size(model, journal)
        if self.dropout and (mesh := mesh_of(model)):
            journal.around(model, decoder_path(model), draw_alike, mesh)
        journal.method(model, "", "save_pretrained", save_pretrained)
        if first:
            state.keep(model)
        return Report((*_described(adapted, layout_of(model)), *trained))

    def why_kept(self, model: nn.Module, state: Any) -> str | None:
        reason: str | None = state.why_kept(model)
        return reason


def _described(adapted: Mapping[Place, tuple[int, Adapter]], layout: Layout) -> list[str]:
    """What was adapted, a sentence for each rank that adapters have."""
    lines = []
    for rank in dict.fromkeys(rank for rank, _ in adapted.values()):
        some = [place for place, (one, _) in adapted.items() if one == rank]
        names = dict.fromkeys(place.name.rpartition(".")[2] for place in some)
        count = sum(math.prod(layout.form(name).shape) for place in some for name in place.factors)
        lines.append(f"adapters of rank {rank} beside {len(some)} weights ({', '.join(names)}): {count:,} values")
    return lines


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _numbers(given: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if given is None else tuple(given) if isinstance(given, Iterable) else (given,)


@takes_model
def with_lora(
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] = TARGETS,
    layers: int | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    rslora: bool = False,
    train: str | Sequence[str] = (),
    config: Any = None,
) -> Lora:
    """Low-rank adapters (LoRA, Hu et al. 2021) on attention, router, head and experts; all else is frozen.

    A weight W [out, in] gets two parameters beside it, `lora_A` [rank, in] and `lora_B` [out, rank], and its product
    with x becomes `W x + scale * B A x`, scale being `alpha / rank`. Each expert has a pair of its own, `lora_A`
    [E, rank, in] and `lora_B` [E, out, rank], applied to the tokens that are routed to it. W + BA is never made, so
    that weights may stay packed as MXFP4. A begins at random (Kaiming, the same on all ranks), B with zeros, as in
    peft. Parallel wrappers shard adapters as what they adapt. Trained adapters stay when other wrappers come and go.

    `model.save_pretrained` writes the adapter, as peft does; see `save_adapter`, `load_adapter`, `adapters_off`,
    `merge_lora` and `export`.

    Args:
        model: a GPT-OSS model, which is changed and returned; a function that returns one; or nothing, for a wrapper to
            give to `compose` or `load`.
        rank: the rank of the adapters.
        alpha: see above.
        dropout: the probability with which an input of an adapter is left out in training. Ranks that share a batch
            then go on with the random numbers of the first of them.
        targets: which weights, by the end of their name: "q_proj", "k_proj", "v_proj", "o_proj", "router", "lm_head",
            and "gate_up_proj", "down_proj" of the experts; or a regular expression for the whole name.
        layers: the numbers of the layers in which weights are adapted, all by default. What is named in full, such as
            "lm_head", is adapted anyway.
        dtype: that of the adapters. They are multiplied in the dtype of what goes through them.
        rslora: scale by `alpha / sqrt(rank)` (Kalajdzievski 2023).
        train: parameters of the model's own that are trained too, by a part of their name: "router", "norm", "sinks",
            "bias", "embed_tokens" and so on.
        config: a `peft.LoraConfig` that says all of this instead.

    Raises:
        CompatibilityError: not a GPT-OSS model, a name that is not there, or the model is adapted already.
        ValueError: an option cannot be, or the config has a field that is not served.

    Example:
        >>> model = with_lora(with_mxfp4_experts(model), rank=4)
        >>> sorted({name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad})
        ['down_proj_lora_A', 'down_proj_lora_B', 'gate_up_proj_lora_A', 'gate_up_proj_lora_B', 'lora_A', 'lora_B']
    """
    given: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "targets": targets if isinstance(targets, str) and not targets.isidentifier() else _names(targets),
        "layers": _numbers(layers),
        "rslora": rslora,
        "train": _names(train),
    }
    if config is not None:
        if twice := [name for name, value in given.items() if value != getattr(Lora, name)]:
            raise ValueError(f"with_lora: config and {', '.join(twice)} say the same. Give one of them.")
        given = options_of(config)
    return Lora(dtype=str(dtype).removeprefix("torch."), **given)
