"""What a wrapper says of itself: a frozen dataclass of its options, and what it will do to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar

from torch import nn

from ..layout import Layout, Mesh
from .backend import Choice
from .journal import Journal


class Phase(IntEnum):
    """The canonical order of wrappers. The order in which the user calls them never matters.

    What several ranks do together lies around what each computes, so it goes on after what computes and adapts. What
    becomes of the output of modules as they are then, adapters included, stands in between.
    """

    LAYOUT = 0
    COMPUTE = 1
    ADAPT = 2
    LOSS = 3
    PARALLEL = 4
    OBSERVE = 5


@dataclass(frozen=True)
class Report:
    """What a wrapper did, for `explain`: one sentence per change, and the backend chosen (if it has backends)."""

    changed: tuple[str, ...]
    choice: Choice | None = None


class Host:
    """The kind of model that a wrapper belongs on; this one is any `nn.Module`."""

    def why_not(self, model: nn.Module) -> str | None:
        """Return the reason why `model` is not such a model, with what to do instead, or None."""
        return None

    def own_config(self, model: nn.Module, journal: Journal) -> None:
        """Give `model` its own copy of whatever it may share with other models (its config)."""

    def release(self, model: nn.Module, journal: Journal) -> None:
        """Undo `own_config`, unless the user's own changes would be lost."""

    def tell_new(self, parameters: Sequence[str], model: nn.Module, journal: Journal) -> None:
        """Tell the model, whenever it was wrapped, how it is saved now, and which `parameters` wrappers brought."""


Filler = Callable[[nn.Module, "Attachment"], Iterable[str] | None]
"""Fills a slot of a model through the journal, and may say what it changed, as sentences."""

MAX_SHOWN = 80
"""How many characters of an option are written out where a wrapper is named."""

WRAPPERS: dict[str, type[Spec]] = {}
"""Every wrapper class by its public name: how a stack comes back from JSON, and what the contract tests run over."""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


@dataclass(frozen=True, kw_only=True, repr=False)
class Spec:
    """What all wrappers say. Subclasses are frozen dataclasses whose fields are the user's options.

    Conflicts are data. A slot is whatever a wrapper writes on a model: it is claimed by one wrapper alone, yielded to
    one that claims it, or filled by default where nobody else does. Two wrappers that claim one slot cannot be
    stacked; neither can one that `provides` a trait with one that `refuses` it. `check` is for arithmetic only (does 8
    divide over 16?).

    Class attributes:
        name: the public function that builds it, such as `"with_flash_attention"`.
        phase: where it stands in the canonical order.
        host: the kind of model it goes on.
        claims: slots that only one wrapper may hold.
        yields: slots that it holds unless another wrapper claims them. If all are claimed, and it claims none itself,
            it stands by and changes nothing.
        defaults: slots that it fills, by a function each, where no other wrapper of the stack holds them. Of several
            that would, the first does.
        provides: traits that the wrapped model has.
        refuses: traits it cannot live with, each with why and what to do instead.
        reversible: whether `undo` can take it off. One that cannot be may still be taken off and put on again, with the
            parameters as they are, when another goes before it.
    """

    name: ClassVar[str]
    phase: ClassVar[Phase]
    host: ClassVar[Host] = Host()
    claims: ClassVar[tuple[str, ...]] = ()
    yields: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Filler]] = {}
    provides: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[Mapping[str, str]] = {}
    reversible: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = WRAPPERS.get(getattr(cls, "name", ""))
        if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__qualname__} needs a `name` of its own: {known.name!r} is {known.__qualname__}.")
        if "name" in cls.__dict__:
            WRAPPERS[cls.name] = cls

    def check(self, model: nn.Module) -> Iterable[str]:
        """Problems with this very model, as sentences. Touches nothing."""
        return ()

    def confer(self, model: nn.Module | None, stack: Sequence[Spec], problems: Sequence[str]) -> list[str] | None:
        """Problems that other processes have with this stack, or that they have another one, as sentences.

        For a wrapper that makes several processes work together: each process calls this once, before anything is
        touched, on the first wrapper of its stack that confers, with its own `problems`, so that none goes on while
        another cannot. A process that could not even make its model has none. None says that there are no others.
        """
        return None

    def choice(self, model: nn.Module) -> Choice | None:
        """The backend for this very model as it is now; None for a wrapper that has none. Touches nothing.

        `attach` finds it in its journal. When the wrapper is applied again and the choice is another (the model was
        moved or cast since), it is attached anew. Raises `BackendError`, whose message becomes a problem of the stack,
        if none can serve.
        """
        return None

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        """`layout` with what this wrapper asks of it, for a model that may be on the meta device. Touches nothing.

        It needs no other process. The bytes are moved before `attach`.
        """
        return layout

    def bind(self, model: nn.Module, mesh: Mesh | None) -> Mesh | None:
        """The ranks that hold the model together: those of `mesh`, and those along the axes this wrapper asked for."""
        return mesh

    def attach(self, model: nn.Module, journal: Attachment) -> Report:
        """Change `model` through `journal`, and say what was changed."""
        raise TypeError(f"{type(self).__name__} does not define attach(model, journal)")

    def why_kept(self, model: nn.Module, state: Any) -> str | None:
        """What `undo` would lose by taking this off now, and what keeps it, as a sentence without its end, or None.

        It is asked on all ranks, with the `state` that `attach` left.
        """
        return None

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"{self.name}({', '.join(f'{name}={_short(value)}' for name, value in values.items())})"


@dataclass
class Attachment(Journal):
    """A wrapper on a model: what the core settled for it before it was attached, and the journal of what it changed.

    Attributes:
        wrapper: what is attached.
        choice: what its `choice` gave for this model, computed once.
        state: what the wrapper left here when it was last attached, None the first time. It may set it anew.
        holder: the wrapper that it stands by for and the slot that one holds, if it stands by.
        report: what it has to say about its changes.
    """

    wrapper: Spec = field(kw_only=True)
    choice: Choice | None = None
    state: Any = None
    holder: tuple[Spec, str] | None = None
    report: Report = Report(())
