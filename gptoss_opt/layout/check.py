"""Whether a model can be brought into a layout: what is wrong is found before anything moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from torch import nn

from .holders import under_fsdp, under_zero
from .initial import INITS
from .layout import UNKNOWN, Form, Layout, LayoutError, New
from .relayout import Held
from .storage import DENSE, STORAGES, Split


def check(layout: Layout, model: nn.Module, held: Mapping[str, Held]) -> None:
    """Raise `LayoutError` unless `model`, whose parameters are `held` now, can be brought into `layout`."""
    of_tensor: dict[str, str] = {}
    modules = dict(model.named_modules()) if layout.new else {}
    for parameter in layout:
        form = layout.form(parameter)
        problems = chain(_wrong_form(parameter, form, layout), _wrong_splits(parameter, form, layout))
        if form.new and parameter not in held:
            problems = chain(problems, _wrong_name(parameter, form.new, modules))
        for problem in problems:
            raise LayoutError(f"{form.by or next((one.by for one in form.splits), '') or 'a wrapper'} {problem}")
        for tensor in Held(form).names(parameter):
            if (other := of_tensor.setdefault(tensor, parameter)) != parameter:
                raise LayoutError(f"{other} and {parameter} are both held as {tensor}. Give the new one another name.")


def check_movable(layout: Layout, model: nn.Module, held: Mapping[str, Held]) -> None:
    """Raise `LayoutError` unless what is to be held otherwise than now can be read, and what is new be added."""
    holder = _holder(model)
    dropped = next((name for name, how in held.items() if how.form.new and name not in layout), None)
    if holder and dropped is not None:
        raise LayoutError(
            f"{dropped} would be dropped, and is held by {holder[0]}, since {holder[1]}. Undo before that."
        )
    for parameter in layout:
        form, how = layout.form(parameter), held.get(parameter, Held(Form()))
        if form.new and parameter not in held and holder:
            raise LayoutError(
                f"{form.by} adds {parameter}, and {holder[0]}, which holds the model since {holder[1]}, would not know "
                "of it. Wrap before that."
            )
        stays = (form.storage, form.splits, not layout.axes) == (how.form.storage, how.form.splits, how.mesh is None)
        if form.new or stays:
            continue
        for name in how.names(parameter):
            tensor = model.get_parameter(name)
            if tensor.is_meta:
                raise LayoutError(
                    f"{name} is on the meta device, without values: it was never loaded, or is offloaded. Use "
                    "load(path, ...), or wrap and undo before offloading."
                )
            ours = type(tensor) in (nn.Parameter, STORAGES[how.form.storage].kind)
            if not ours and not (how.mesh and how.mesh.holds(tensor)):
                raise LayoutError(
                    f"{name} is a {type(tensor).__name__}, which something else has made of it (fully_shard, a "
                    "quantiser). Wrap and undo before that."
                )
            if holder:
                raise LayoutError(f"{name} is held by {holder[0]}, since {holder[1]}. Wrap and undo before that.")


def _holder(model: nn.Module) -> tuple[str, str] | None:
    """What else holds the parameters of a model and gathers them for its forwards, and since which call; or None."""
    if under_fsdp(model):
        return "FSDP", "fully_shard"
    if under_zero(model):
        return "DeepSpeed's ZeRO-3", "deepspeed.initialize"
    return None


def _wrong_form(parameter: str, form: Form, layout: Layout) -> Iterator[str]:
    if form.shape == UNKNOWN:
        yield f"asks for {parameter}, which model.named_parameters() does not have. Of tied ones use the first name."
    elif form.storage not in STORAGES:
        yield f"stores {parameter} as {form.storage!r}. Known are {', '.join(sorted(STORAGES))}."
    elif form.new:
        yield from _wrong_new(parameter, form, form.new, layout)
    elif reason := STORAGES[form.storage].why_not(form.shape):
        yield f"stores {parameter} {list(form.shape)} as {form.storage!r}: {reason}"


def _wrong_new(parameter: str, form: Form, new: New, layout: Layout) -> Iterator[str]:
    if form.storage != DENSE.name:
        yield f"stores {parameter} as {form.storage!r}, but parameters that wrappers bring are dense."
    if new.init not in INITS:
        yield f"adds {parameter} with init={new.init!r}. Use {', '.join(INITS)}."
    if 0 in form.shape or (new.init == "kaiming_uniform" and not form.shape):
        yield f"adds {parameter} of shape {list(form.shape)}, which init={new.init!r} cannot fill."
    if new.trainable and not form.dtype.is_floating_point:
        yield f"adds {parameter} of {form.dtype}, which cannot be trained. Use trainable=False."
    beside = layout.asked.get(new.beside or "", Form())
    if new.beside is None:
        if new.dims:
            yield f"adds {parameter} with dims, but beside no parameter. Say beside which one."
    elif beside.shape == UNKNOWN or beside.new:
        yield f"adds {parameter} beside {new.beside}, which is no parameter of the model's own."
    elif (off := [pair for pair in new.dims if not _alike(beside, form, *pair)]) or new.beside == parameter:
        sizes = f"{list(form.shape)} and {list(beside.shape)}"
        yield f"adds {parameter} beside {new.beside}, of {sizes}, where dims={dict(off)} must pair what is of one size."


def _alike(beside: Form, form: Form, there: int, here: int) -> bool:
    inside = 0 <= there < len(beside.shape) and 0 <= here < len(form.shape)
    return inside and beside.shape[there] == form.shape[here]


def _wrong_splits(parameter: str, form: Form, layout: Layout) -> Iterator[str]:
    for split in form.splits:
        degree = next((axis.degree for axis in layout.axes if axis.name == split.axis), None)
        if degree != len(split.parts):
            count = f"{len(split.parts)} parts over axis {split.axis!r} of {degree or 'no'} ranks"
            yield f"splits {parameter} in {count}. Name the axis first: layout.over(Axis(name, degree))."
        elif not 0 <= split.dim < len(form.shape) or not _covers(split, form.shape[split.dim]):
            yield f"splits dim {split.dim} of {parameter} {list(form.shape)}. Give each index to one rank."
    try:
        form.stored_splits()
    except ValueError as error:
        yield f"splits {parameter}, which is stored as {form.storage!r}: {error}"


def _covers(split: Split, size: int) -> bool:
    if all(isinstance(part, range) and part.step == 1 for part in split.parts):
        bounds = sorted((part[0], part[-1] + 1) for part in split.parts if part)
        return [0, *(end for _, end in bounds)] == [*(first for first, _ in bounds), size]
    return all(list(part) == sorted(part) for part in split.parts) and sorted(chain(*split.parts)) == [*range(size)]


def _wrong_name(parameter: str, new: New, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    path, _, name = parameter.rpartition(".")
    module = modules.get(path)
    if module is None:
        yield f"adds {parameter}, but the model has no module {path}."
    elif not name.isidentifier() or hasattr(module, name):
        yield f"adds {parameter}, but {type(module).__name__} has a {name!r} already. Give it another name."
    elif new.beside and new.beside.rpartition(".")[0] != path:
        yield f"adds {parameter} beside {new.beside}, which is in another module. Compute it in that one."
