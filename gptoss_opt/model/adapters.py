"""Where low-rank adapters go in a GPT-OSS model, what they are called, and how modules compute with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from ..core import Attachment, Journal, held_by, mesh_of
from ..core.record import record_of, wrapped_model
from ..distributed import ModelMesh, attributes, local_part, sum_of_parts
from ..layout import DENSE
from .changes import ADAPTERS, SWITCH, A, Adapter, B, Switch, change_of
from .experts import PROJECTIONS, check_implementation
from .modules import expert_modules

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """A weight of a model that can have an adapter.

    Attributes:
        name: what targets call it: the path of its module, or, of a module with several weights, its own name.
        weight: the name of the weight.
        dims: its dimensions of inputs and outputs; one before them counts experts.
        before: what the names of the adapter's parameters in the module begin with.
        linear: whether the module is a linear layer.
    """

    name: str
    weight: str
    dims: tuple[int, int] = (1, 0)
    before: str = ""
    linear: bool = True

    @property
    def module(self) -> str:
        """The path of the module."""
        return self.weight.rpartition(".")[0]

    @property
    def factors(self) -> tuple[str, str]:
        """The names of A and B."""
        return f"{self.module}.{self.before}{A}", f"{self.module}.{self.before}{B}"

    @property
    def key(self) -> str:
        """What patterns of peft call it: the path of a linear layer, else the name of the weight."""
        return self.name if self.linear else self.weight

    @property
    def layer(self) -> int | None:
        """The number of the layer it is in, None if it is in none."""
        found = LAYER.search(self.name)
        return int(found[1]) if found else None

    @property
    def of_experts(self) -> bool:
        """Whether there is one such weight for each expert."""
        return max(self.dims) > 1

    def shapes(self, weight: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B beside a weight of this shape: [r, in] and [out, r], for each expert if there are."""
        experts = tuple(weight[:1]) if self.of_experts else ()
        num_in, num_out = (weight[dim] for dim in self.dims)
        return (*experts, rank, num_in), (*experts, num_out, rank)

    def dims_along(self) -> tuple[dict[int, int], dict[int, int]]:
        """Which dimension of the weight runs along which of A, and of B."""
        experts = {0: 0} if self.of_experts else {}
        first = len(experts)
        return {**experts, self.dims[0]: first + 1}, {**experts, self.dims[1]: first}


def places(model: nn.Module) -> Iterator[Place]:
    """Every weight that can have an adapter, in the order of the model's modules."""
    experts = dict(expert_modules(model))
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | GptOssTopKRouter):
            yield Place(path, f"{path}.weight", linear=isinstance(module, nn.Linear))
        elif path in experts:
            for projection in PROJECTIONS:
                yield Place(f"{path}.{projection}", f"{path}.{projection}", (1, 2), f"{projection}_", linear=False)


def is_named(name: str, by: str | Sequence[str]) -> bool:
    """Whether a name is meant, as peft reads it: by its end, in whole words, or by a regular expression for all of it.

    Example:
        >>> is_named("layers.0.q_proj", ["q_proj"]), is_named("layers.0.q_proj", r".*\\.0\\..*q_proj")
        (True, True)
    """
    if isinstance(by, str):
        return re.fullmatch(by, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in by)


def of_pattern(name: str, patterns: Sequence[tuple[str, float]]) -> float | None:
    """The value of the first pattern that a name ends with, as peft reads its `rank_pattern`; None if there is none."""
    return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def why_no_pattern(pattern: str) -> str | None:
    """Say why a pattern cannot be read, or None."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is no regular expression: {error}. Correct it."
    return None


def set_adapters(model: nn.Module, adapters: dict[Place, Adapter], switch: Switch, journal: Journal) -> None:
    """Let the modules of some places compute with adapters, whose parameters are there already."""
    of_module: dict[str, dict[str, Adapter]] = {}
    for place, adapter in adapters.items():
        of_module.setdefault(place.module, {})[place.before] = adapter
    for path, adapted in of_module.items():
        journal.set(model, path, ADAPTERS, adapted)
        journal.set(model, path, SWITCH, switch)
        journal.around(model, path, _forward_of(model.get_submodule(path)), None)


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    if isinstance(module, nn.Linear):
        return adapted_linear
    return adapted_router if isinstance(module, GptOssTopKRouter) else adapted_experts


def adapted_linear(_: None, module: Any, inner: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A linear layer, and what its adapter adds."""
    change, y = change_of(module), inner(x)
    return y if change is None else change.added_to(y, x)


def adapted_router(_: None, module: Any, inner: Callable[..., Any], hidden_states: Tensor) -> Any:
    """The router, whose product is part of its forward: A's outputs are more inputs to it, with B as their weights."""
    change = change_of(module)
    if change is None:
        return inner(hidden_states)
    b = change.factors(module.weight.dtype)[1]
    with attributes(module, {"weight": torch.cat([module.weight, b], -1)}):
        return inner(torch.cat([hidden_states, change.hidden(hidden_states).to(hidden_states.dtype)], -1))


def adapted_experts(_: None, module: Any, inner: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The experts, whose computation looks for adapters itself; another one would leave them out."""
    if not module.__dict__[SWITCH].off:
        check_implementation(module, "adapters on experts", "with_lora")
    return inner(*args, **kwargs)


def draw_alike(mesh: ModelMesh, module: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward, in which ranks that share a batch leave the same inputs of adapters out in training."""
    if module.training:
        _share_random_state(mesh)
    return inner(*args, **kwargs)


def _share(mesh: ModelMesh) -> None:
    mesh.share_random_state(torch.device("cpu"))  # whence `dropped` draws


_share_random_state: Callable[[ModelMesh], None] = torch.compiler.disable(
    _share, reason="ranks send each other a state"
)


def keep_size(model: Any, journal: Journal) -> None:
    """Refuse to resize a head that has an adapter: transformers would put another one in its place, without."""
    head = model.get_output_embeddings()
    # The head of a sharded model is not resized anyway.
    if head is not None and ADAPTERS in head.__dict__ and mesh_of(model) is None:
        journal.set(model, "", "resize_token_embeddings", cannot_resize)


def cannot_resize(*args: Any, **kwargs: Any) -> None:
    """Stand in for `resize_token_embeddings` of a model with an adapter on its head."""
    raise ValueError(
        "resize_token_embeddings: the head has an adapter of the size that it has now. Resize the model before "
        "with_lora, or after undo(model, with_lora)."
    )


def train_only(model: nn.Module, names: Sequence[str], new: Sequence[str], journal: Journal) -> list[str]:
    """Freeze all parameters of a model but `new` ones and those with a part named in `names`; says so, in sentences."""
    for name, how in held_by(model).items():
        named = next(filter(None, (_named(one, names) for one in (name, *how.names(name)))), None)
        if how.form.storage != DENSE.name and named:
            raise ValueError(
                f"train={named!r} names {name}, which is stored as {how.form.storage!r}, and takes no gradient. Leave "
                "it out, or take off what stores it so (undo)."
            )
    for name, parameter in model.named_parameters():
        trained = _named(name, names) is not None
        if name not in new and parameter.requires_grad != trained:
            journal.set(model, name, "requires_grad", trained)
    return [f"trained: the adapters{''.join(f', {name}' for name in names)}; all else is frozen"]


def _named(parameter: str, names: Sequence[str]) -> str | None:
    """The first of some names that a part of a parameter's name, up to a dot, ends with."""
    return next((name for name in names if f"{name}." in f"{parameter}."), None)


def why_not_named(model: nn.Module, names: Sequence[str]) -> Iterator[str]:
    """Say which of the names in `train` no parameter has."""
    known = {*held_by(model), *(name for name, _ in model.named_parameters())}
    for name in names:
        if not any(_named(parameter, [name]) for parameter in known):
            yield f"train={name!r} is part of no parameter's name. Known are router, norm, sinks, bias and so on."


def adapter_parameters(model: nn.Module) -> Iterator[tuple[Place, Adapter, Tensor, Tensor]]:
    """Every adapter on a model: its place, how it counts, and its parameters A and B."""
    for place in places(model):
        module: Any = model.get_submodule(place.module)
        adapter = module.__dict__.get(ADAPTERS, {}).get(place.before)
        if adapter is not None:
            a, b = map(model.get_parameter, place.factors)
            yield place, adapter, a, b


def why_no_adapters(model: nn.Module) -> Iterator[str]:
    """Say what stands in the way of adapters on this model."""
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") or (hasattr(module, A) and ADAPTERS not in module.__dict__):
            yield (
                f"{path} is adapted by a {type(module).__name__} already. Merge that adapter first (peft: "
                "merge_and_unload()), or read it with load_adapter(model, path) instead."
            )
            return


def why_tied(model: nn.Module, adapted: Iterable[Place]) -> Iterator[str]:
    """Say which weights have no parameter of their own, beside which adapters could stand."""
    names = {name for name, _ in model.named_parameters()}
    for place in adapted:
        if place.linear and place.weight not in names:
            yield f"{place.weight} is tied to another parameter, beside which no adapter can stand. Leave it out."


@dataclass
class AdapterState:
    """What is known of the adapters on a model: which values of theirs are on disk, or are those they began with.

    Attributes:
        kept: by the name of each parameter, the sum of the bits of its values as integers.
        switch: whether they are off for a while.
    """

    kept: dict[str, int] = field(default_factory=dict[str, int])
    switch: Switch = field(default_factory=Switch)

    def keep(self, model: nn.Module) -> None:
        """Take note that what the adapters hold now is on disk, or is nothing that could be lost. On all ranks."""
        self.kept = fingerprints(model)

    def why_kept(self, model: nn.Module) -> str | None:
        """Say why the adapters must not be taken off, or None. On all ranks."""
        now = fingerprints(model)
        # Second factors of zeros add nothing, whatever dtype they were cast to.
        if now == self.kept or not any(now[place.factors[1]] for place, *_ in adapter_parameters(model)):
            return None
        return "it holds adapters that were trained and not saved. save_adapter(model, path) keeps them"


def adapters_on(model: nn.Module) -> Attachment:
    """The wrapper that put adapters on a model, with its state. Raises `ValueError` if none has."""
    found = [one for one in record_of(model).applied if isinstance(one.state, AdapterState)]
    if not found:
        raise ValueError(f"there are no adapters on this {type(model).__name__}. Put some on it: with_lora(model).")
    return found[0]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Meanwhile, a model computes as if it had no adapters: as the base, but for what `train=` has changed of it.

    That is the reference policy of DPO and GRPO, without a second copy. On several ranks, each must enter it.

    Raises:
        ValueError: there are no adapters on the model.

    Example:
        >>> model = with_lora(model)
        >>> with adapters_off(model):
        ...     reference = model(input_ids).logits
    """
    switch = adapters_on(wrapped_model(model)).state.switch
    before, switch.off = switch.off, True
    try:
        yield
    finally:
        switch.off = before


def fingerprints(model: nn.Module) -> dict[str, int]:
    """By name of an adapter's parameter, the sum of the bits of its values as integers, the same on all ranks."""
    names = (name for place, *_ in adapter_parameters(model) for name in place.factors)
    return {name: sum_of_bits(model.get_parameter(name)) for name in names}


def sum_of_bits(parameter: Tensor) -> int:
    """The sum of the bits of a parameter's values as integers, the same on all ranks that hold a part of it."""
    local = local_part(parameter).contiguous()
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    return int(sum_of_parts(local.view(as_integers).sum(dtype=torch.int64), parameter))
