"""Layout: how every parameter of a model is stored, and which slice of it each rank holds. Wrappers edit it as data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .storage import DENSE, STORAGES, Part, Split

UNKNOWN = (-1,)
"""The shape of a parameter that a model does not have, or that a layout was asked for without a model."""


class LayoutError(ValueError):
    """A wrapper asks for what no parameter can be, or two ask for what one cannot be at once."""


def require(problems: Iterable[str]) -> None:
    """Raise `LayoutError` with the first of some problems, if there are any."""
    for problem in problems:
        raise LayoutError(problem)


@dataclass(frozen=True)
class Axis:
    """Ranks that hold a model together, along one axis of a mesh. Plain data: no process has to be there.

    Attributes:
        name: the name of the axis.
        degree: how many ranks there are along it.
        data_parallel: whether each of them has tokens of its own.
    """

    name: str
    degree: int
    data_parallel: bool = False


@dataclass(frozen=True)
class New:
    """What a parameter is that exists only because a wrapper asked for it.

    Attributes:
        init: its first values, by their name in `INITS`.
        trainable: whether it takes gradients.
        beside: the parameter whose module it computes with, so that it is split as that one is.
        dims: pairs of a dimension of `beside` and the dimension of the new parameter that is split along with it.
    """

    init: str
    trainable: bool = True
    beside: str | None = None
    dims: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Form:
    """How a parameter is held: in which storage, and which slice of it by each rank.

    Attributes:
        storage: the name of its storage.
        splits: its dimensions that are spread over ranks, each over another axis.
        added_once: axes over whose ranks the result that it is added to is summed: it counts on the first of them.
        partial: axes over whose ranks each computes a part with all of it, so that its gradient is the sum of theirs.
        new: what it is, if a wrapper brought it.
        shape: the shape of the whole dense parameter.
        dtype: the dtype of its dense values.
        by: the wrapper that asked for its storage, or brought it.
    """

    storage: str = DENSE.name
    splits: tuple[Split, ...] = ()
    added_once: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    new: New | None = None
    shape: tuple[int, ...] = field(default=UNKNOWN, compare=False)
    dtype: torch.dtype = field(default=torch.float32, compare=False)
    by: str = field(default="", compare=False)

    def index(self, coordinate: Mapping[str, int]) -> dict[int, Part]:
        """The indices that the rank at a `coordinate` (by axis) holds, for each dimension that is split."""
        return {split.dim: split.parts[coordinate[split.axis]] for split in self.splits}

    def stored_splits(self) -> list[Split]:
        """The splits as they fall in the stored tensors."""
        return [STORAGES[self.storage].split(split) for split in self.splits]

    def num_bytes(self, coordinate: Mapping[str, int]) -> int:
        """The bytes that the rank at a coordinate holds.

        Example:
            >>> form = Form(splits=(Split(0, "tp", (range(0, 4), range(4, 6))),), shape=(6, 4), dtype=torch.bfloat16)
            >>> form.num_bytes({"tp": 0}), form.num_bytes({"tp": 1})
            (32, 16)
        """
        index = self.index(coordinate)
        num_values = math.prod(len(index.get(dim, range(size))) for dim, size in enumerate(self.shape))
        return STORAGES[self.storage].num_bytes(num_values, self.dtype.itemsize)


@dataclass(frozen=True)
class Layout:
    """How every parameter of a model is held, by the name that it has when dense. Pure data.

    What wrappers ask for commutes: a layout is the same whichever of them edits it first.

    Attributes:
        asked: for each parameter, what was asked for; `form` says what follows from it.
        axes: the ranks that hold the model together, by axis; empty if one process holds all of it.
        author: the wrapper that edits it now, named in errors.

    Example:
        >>> layout = Layout().store(["experts.down_proj"], "mxfp4")
        >>> layout = layout.split(["experts.down_proj"], Split(0, "ep", (range(0, 2), range(2, 4))))
        >>> layout.form("experts.down_proj").storage, layout.form("experts.down_proj").index({"ep": 1})
        ('mxfp4', {0: range(2, 4)})
    """

    asked: Mapping[str, Form] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()
    author: str = field(default="", compare=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.asked)

    def form(self, parameter: str) -> Form:
        """How a parameter is to be held, all that was asked for considered. Raises `LayoutError` if that cannot be."""
        asked = self.asked.get(parameter, Form())
        splits, partial, once = asked.splits, asked.partial, asked.added_once
        if asked.new and asked.new.beside and not self.asked.get(asked.new.beside, asked).new:
            beside, dims = self.form(asked.new.beside), dict(asked.new.dims)
            splits += tuple(replace(split, dim=dims[split.dim]) for split in beside.splits if split.dim in dims)
            partial = tuple(split.axis for split in beside.splits if split.dim not in dims) + beside.partial
            once += beside.added_once
        splits = _in_force(parameter, splits)
        once = tuple(axis for axis in once if axis not in {split.axis for split in splits})
        return replace(asked, splits=splits, added_once=once, partial=partial)

    @property
    def storages(self) -> dict[str, str]:
        """The storage of each parameter that is not dense."""
        return {name: form.storage for name, form in self.asked.items() if form.storage != DENSE.name}

    @property
    def new(self) -> list[str]:
        """The parameters that wrappers brought."""
        return [name for name, form in self.asked.items() if form.new]

    def max_bytes(self) -> int:
        """The bytes of all parameters on the fullest rank."""
        forms = [self.form(parameter) for parameter in self]
        places = itertools.product(*(range(axis.degree) for axis in self.axes))
        coordinates = [dict(zip((axis.name for axis in self.axes), place, strict=True)) for place in places]
        return max(sum(form.num_bytes(coordinate) for form in forms) for coordinate in coordinates)

    def store(self, parameters: Iterable[str], storage: str) -> Layout:
        """This layout with `parameters` in `storage`. Raises `LayoutError` if another wrapper stores one otherwise."""
        old = {name: self._asked(name) for name in parameters}
        for name, form in old.items():
            if form.storage not in (DENSE.name, storage):
                raise LayoutError(
                    f"{form.by or 'a wrapper'} stores {name} as {form.storage!r}, and {self.author or 'another'} as "
                    f"{storage!r}. Keep one of them."
                )
        return self._with({name: replace(form, storage=storage, by=self.author) for name, form in old.items()})

    def split(self, parameters: Iterable[str], split: Split) -> Layout:
        """This layout with one dimension of `parameters` spread over ranks."""
        split = replace(split, by=split.by or self.author)
        old = {name: self._asked(name) for name in parameters}
        return self._with({name: replace(form, splits=(*form.splits, split)) for name, form in old.items()})

    def add_once(self, parameters: Iterable[str], axis: str) -> Layout:
        """This layout with `parameters` added once to a sum over an axis, unless they are split over it."""
        old = {name: self._asked(name) for name in parameters}
        return self._with({name: replace(form, added_once=(*form.added_once, axis)) for name, form in old.items()})

    def add(
        self,
        parameter: str,
        shape: Sequence[int],
        *,
        init: str = "zeros",
        dtype: torch.dtype | None = None,
        trainable: bool = True,
        beside: str | None = None,
        dims: Mapping[int, int] | None = None,
    ) -> Layout:
        """Return this layout with a new parameter, which exists as long as a wrapper asks for it.

        Its first values are the same on all ranks, and whatever else is on the model. It keeps its values when other
        wrappers come and go. Where ranks hold a part of the parameter that it stands beside, they hold that part of
        it too; where they sum what that one gives, they sum what both give, so that it must be a part of that sum.

        Args:
            parameter: its name, which is the name of a module of the model and one more word.
            shape: its whole shape, as one process alone would hold it.
            init: "zeros", "ones", or "kaiming_uniform" (He et al. 2015, as PEFT draws the first matrix of a LoRA pair:
                uniform within one over the square root of the last dimension).
            dtype: the dtype of its values; by default that of `beside`, else float32.
            trainable: whether it takes gradients.
            beside: a parameter of the same module, with which it takes part in one computation.
            dims: which dimension of `beside` runs along which of this one, {there: here}. Beside a weight [out, in],
                a first matrix [rank, in] has {1: 1}, for the inputs, and a second one [out, rank] has {0: 0}.

        Raises:
            LayoutError: another wrapper brings a parameter of that name.

        Example:
            >>> halves = Split(0, "tp", (range(0, 4), range(4, 8)))
            >>> layout = Layout().add("q_proj.lora_B", (8, 2), beside="q_proj.weight", dims={0: 0})
            >>> layout.split(["q_proj.weight"], halves).form("q_proj.lora_B").index({"tp": 1})
            {0: range(4, 8)}
        """
        if parameter in self.asked:
            there = self.asked[parameter]
            owner = (there.by or "another wrapper") if there.new or there.shape == UNKNOWN else "the model"
            raise LayoutError(
                f"{self.author or 'a wrapper'} adds {parameter}, which {owner} has already. Give it another name."
            )
        new = New(init, trainable, beside, tuple((dims or {}).items()))
        dtype = dtype or self._asked(beside or "").dtype
        return self._with({parameter: Form(new=new, shape=tuple(shape), dtype=dtype, by=self.author)})

    def over(self, axis: Axis) -> Layout:
        """This layout on the ranks along `axis` too. Raises `LayoutError` if it has another axis of that name."""
        same = next((one for one in self.axes if one.name == axis.name), None)
        if same is None:
            return replace(self, axes=tuple(sorted((*self.axes, axis), key=lambda one: one.name)))
        if same.degree != axis.degree:
            raise LayoutError(
                f"axis {axis.name!r} of {axis.degree} ranks and axis {axis.name!r} of {same.degree} are no axes of one "
                "mesh. Give the same axis to both, or make a mesh of two: "
                'mesh = gptoss_opt.init_distributed((2, 2), ("ep", "tp")); mesh["ep"], mesh["tp"].'
            )
        if same.data_parallel != axis.data_parallel:
            raise LayoutError(
                f"the ranks along {axis.name} have tokens of their own by one wrapper (dispatch='all_to_all'), and "
                "share them by the other. Use dispatch='all_reduce', or give each wrapper its own axis of a mesh."
            )
        return self

    def _asked(self, parameter: str) -> Form:
        return self.asked.get(parameter, Form())

    def _with(self, forms: Mapping[str, Form]) -> Layout:
        return replace(self, asked={**self.asked, **forms})


def _in_force(parameter: str, splits: Iterable[Split]) -> tuple[Split, ...]:
    """The splits that hold, of all that were asked for: over each axis one, and over each dimension one."""
    found: dict[str, Split] = {}
    for split in sorted(splits, key=lambda one: one.gives_way):
        there = found.setdefault(split.axis, split)
        if there is not split and there.gives_way == split.gives_way:
            raise LayoutError(
                f"{there.by or 'a wrapper'} and {split.by or 'another'} both split {parameter} over axis "
                f"{split.axis!r}. Give each its own axis of a mesh, or drop one of them."
            )
    held = tuple(sorted(found.values()))
    for one, other in itertools.pairwise(held):
        if one.dim == other.dim:
            raise LayoutError(
                f"{one.by or 'a wrapper'} and {other.by or 'another'} both split dimension {one.dim} of {parameter}, "
                f"over the axes {one.axis!r} and {other.axis!r}. Give both the same axis, or drop one of them."
            )
    return held
