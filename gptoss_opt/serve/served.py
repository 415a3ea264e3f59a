"""What serving changes on a model for as long as it is served: attention that reads pages, and evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from ..core import stack_of, undo
from ..model import serving
from ..wrappers.flash_attention import with_flash_attention


@dataclass
class Served:
    """A model that is served.

    Attributes:
        attached: whether attention was put on it for that.
        training: its modules that were in training mode.
        by: who serves it; the last to let go puts everything back.
    """

    attached: bool
    training: list[nn.Module]
    by: WeakSet[Any] = field(default_factory=WeakSet)


_SERVED: WeakKeyDictionary[nn.Module, Served] = WeakKeyDictionary()


def take(model: nn.Module, by: object) -> None:
    """Make a model ready to be served. Raises `CompatibilityError` if attention cannot be put on it."""
    attached = not serving.reads_pages(model)
    if attached:
        with_flash_attention(model)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    served = _SERVED.setdefault(model, Served(False, []))
    served.attached |= attached
    served.training += training
    served.by.add(by)


def let_go(model: nn.Module, by: object) -> None:
    """Put a model back as it was, unless others serve it too. To let go again does nothing."""
    served = _SERVED.get(model)
    if served is None or by not in served.by:
        return
    served.by.discard(by)
    if served.by:
        return
    del _SERVED[model]
    if served.attached and with_flash_attention() in stack_of(model):
        undo(model, with_flash_attention)
    for module in served.training:
        module.training = True
