"""What a wrapper is: a frozen dataclass that says what it will do to a model, and does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeVar, overload

from torch import nn

from .backend import Choice
from .edit import Journal
from .layout import Layout

Model = TypeVar("Model", bound=nn.Module)
Built = TypeVar("Built")


class Phase(IntEnum):
    """The canonical order of wrappers. The order in which the user calls them never matters."""

    LAYOUT = 0
    COMPUTE = 1
    ADAPT = 2
    OBSERVE = 3


@dataclass(frozen=True)
class Report:
    """What `attach` did, for `explain`: one sentence per change, and the backend it chose (if it has backends)."""

    changed: tuple[str, ...]
    choice: Choice | None = None


class Host(Protocol):
    """The kind of model that a wrapper belongs on."""

    def why_not(self, model: nn.Module) -> str | None:
        """The reason why `model` is not such a model, with what to do instead, or None."""
        ...

    def privatise(self, model: nn.Module, journal: Journal) -> None:
        """Give `model` its own copy of whatever it may share with other models (its config)."""
        ...

    def release(self, model: nn.Module, journal: Journal) -> None:
        """Undo `privatise`, unless the user's own changes would be lost."""
        ...


class AnyModule:
    """The host of wrappers that go on any `nn.Module`."""

    def why_not(self, model: nn.Module) -> str | None:
        return None

    def privatise(self, model: nn.Module, journal: Journal) -> None:
        return None

    def release(self, model: nn.Module, journal: Journal) -> None:
        return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST else f"{text[: MOST - 4]} ..."


MOST = 80
"""The longest option that is written out where a wrapper is named."""

WRAPPERS: dict[str, type[Wrapper]] = {}
"""Every wrapper class by its public name: how a stack comes back from JSON, and what the contract tests run over."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Wrapper:
    """Base of all wrappers. Subclasses are frozen dataclasses whose fields are the user's options.

    Conflicts are data. Two wrappers with one claim in common cannot be stacked; neither can one that `provides` a
    trait with one that `refuses` it. `check` is for arithmetic only (does 8 divide over 16?).

    Class attributes:
        name: the public function that builds it, such as `"with_flash_attention"`.
        phase: where it stands in the canonical order.
        host: the kind of model it goes on.
        claims: slots that only one wrapper may hold.
        yields: slots that it takes unless another wrapper claims them; then it stands by and changes nothing.
        provides: traits that the wrapped model has.
        refuses: traits it cannot live with, each with why and what to do instead.
        reversible: whether `undo` can take it off. One that cannot be may still be taken off and put on again, with the
            parameters as they are, when another goes before it.
    """

    name: ClassVar[str]
    phase: ClassVar[Phase]
    host: ClassVar[Host] = AnyModule()
    claims: ClassVar[tuple[str, ...]] = ()
    yields: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[Mapping[str, str]] = {}
    reversible: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            WRAPPERS[cls.name] = cls

    def check(self, model: nn.Module) -> Iterable[str]:
        """Problems with this very model, as sentences. Touches nothing."""
        return ()

    def confer(self, model: nn.Module | None, stack: Sequence[Wrapper], problems: Sequence[str]) -> list[str]:
        """Problems that other processes have with this stack, or that they have another one; theirs, as sentences.

        For a wrapper that makes several processes work together: each calls this before anything is touched, with its
        own `problems`, so that none goes on while another cannot. One that could not even make its model has none.
        """
        return []

    def choice(self, model: nn.Module) -> Choice | None:
        """The backend for this very model as it is now; None for a wrapper that has none. Touches nothing.

        When the wrapper is applied again and the choice is another (the model was moved or cast since), it is attached
        anew. Raises `BackendError`, whose message becomes a problem of the stack, if none can serve.
        """
        return None

    def layout(self, model: nn.Module, layout: Layout) -> Layout:
        """`layout` with what this wrapper asks of it. Touches nothing: the bytes are moved before `attach`."""
        return layout

    def attach(self, model: nn.Module, journal: Journal) -> Report:
        """Change `model` through `journal`, and say what was changed."""
        raise TypeError(f"{type(self).__name__} does not define attach(model, journal)")

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"{self.name}({', '.join(f'{name}={_short(value)}' for name, value in values.items())})"

    @overload
    def __call__(self, target: Model) -> Model: ...
    @overload
    def __call__(self, target: Callable[..., Built]) -> Callable[..., Built]: ...
    def __call__(self, target: Any) -> Any:
        """Apply to a model (the same object is returned), or decorate a function that returns one."""
        from .stack import Stack

        return Stack((self,))(target)
