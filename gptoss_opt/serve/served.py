"""What serving changes on a model for as long as it is served: attention that reads pages, and evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from ..core import stack_of, undo
from ..model import serving
from ..wrappers.flash_attention import with_flash_attention


@dataclass
class Served:
    """A model that is served.

    Attributes:
        attached: whether with_flash_attention was put on the model for that.
        training: its modules that were in training mode.
        users: who serves it; the last one to release it puts everything back.
    """

    attached: bool = False
    training: list[nn.Module] = field(default_factory=list[nn.Module])
    users: set[object] = field(default_factory=set[object])


_SERVED: WeakKeyDictionary[nn.Module, Served] = WeakKeyDictionary()


def acquire(model: nn.Module, user: object) -> None:
    """Make a model ready to be served. Raises `CompatibilityError` if attention cannot be put on it."""
    if attached := not serving.reads_pages(model):
        with_flash_attention(model)
    served = _SERVED.setdefault(model, Served())
    served.attached |= attached
    served.users.add(user)
    training = [module for module in model.modules() if module.training]
    served.training += training
    for module in training:
        module.training = False


def release(model: nn.Module, user: object) -> None:
    """Put a model back as it was, unless others serve it too. A second release by the same user does nothing."""
    served = _SERVED.get(model)
    if served is None or user not in served.users:
        return
    served.users.discard(user)
    if served.users:
        return
    del _SERVED[model]
    if served.attached and with_flash_attention() in stack_of(model):
        undo(model, with_flash_attention)
    for module in served.training:
        module.training = True
