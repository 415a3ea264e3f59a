"""An ordinary checkpoint from a model that several ranks hold together, tensor by tensor."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..core import held_by, layout_of, mesh_of
from ..layout import Split
from .writer import Described, index_of, plan_files, write_file

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def gather_state_dict(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """The whole tensors of a model that several ranks hold together, one after the other.

    Every rank must go through all of it. Rank 0 gets the tensors, in the order of `state_dict()`, on the model's
    device; the others None. Placements of experts are undone: all tensors are as they are in a model that was never
    sharded, packed ones packed. Of a model that is not sharded each process gets its own tensors.

    Args:
        model: a model with `shard_tensor_parallel` or `shard_experts`, or without.

    Yields:
        name, and tensor or None.

    Raises:
        ValueError: parameters are not held as the wrappers left them, as after FSDP's `fully_shard`.

    Example:
        >>> shapes = {name: tensor.shape for name, tensor in gather_state_dict(model) if tensor is not None}
        >>> shapes["model.embed_tokens.weight"]
        torch.Size([128, 64])
    """
    mesh, splits = mesh_of(model), splits_of(model)
    for name, tensor in cast(dict[str, Tensor], model.state_dict(keep_vars=True)).items():
        if mesh is None:
            yield name, tensor.detach()
            continue
        if not isinstance(tensor, DTensor):  # a buffer
            yield name, tensor.detach() if mesh.is_first else None
            continue
        if not mesh.holds(tensor):
            raise ValueError(
                f"{name} is spread over {tensor.device_mesh}, not over the ranks that the wrappers put it on: "
                "something else, such as FSDP, has sharded it since. Save with that, or before it."
            )
        # Replicas of the model have nothing to add.
        yield name, mesh.gather(mesh.local(tensor), splits.get(name, [])) if mesh.in_first_replica else None


def splits_of(model: nn.Module) -> dict[str, list[Split]]:
    """How the tensors of a model are split, by the names they have in `state_dict()`."""
    return {
        name: how.form.stored_splits() for parameter, how in held_by(model).items() for name in how.names(parameter)
    }


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> None:
    """`save_pretrained` of a model that several ranks hold together: rank 0 writes one ordinary checkpoint.

    Every rank must call it. One tensor at a time is gathered and written, and files are put in place when all are
    written.

    Args:
        model: the sharded model.
        save_directory: on a disk that rank 0 sees.
        is_main_process: taken for the sake of transformers' Trainer; it is rank 0 that writes.
        max_shard_size: of one file, in bytes or as "5GB".
        **options: those of transformers that ask for nothing else.

    Raises:
        ValueError: an option that is not served here.
        OSError: on every rank, if rank 0 could not write; on rank 0 itself what went wrong there.
    """
    harmless = {"state_dict": None, "push_to_hub": False, "variant": None, "distributed_checkpoint": False}
    ignored = {"token", "save_peft_format", "save_original_format", "safe_serialization"}
    for option, value in options.items():
        if option not in ignored and (option not in harmless or value is not harmless[option]):
            raise ValueError(
                f"save_pretrained({option}={value!r}) is not served on a sharded model. Save without it: what is "
                "written is an ordinary checkpoint, which transformers loads and saves as you like."
            )
    mesh = mesh_of(model)
    max_bytes, problem, failed = _num_bytes(max_shard_size), None, None
    tensors = gather_state_dict(model)
    if mesh.is_first:
        try:
            _write(model, Path(save_directory), max_bytes, tensors)
        except Exception as error:  # whatever it is: the others are not to wait, and it is raised below
            problem, failed = f"{type(error).__name__}: {error}", error
    for _ in tensors:  # the others', and what is left after a failure
        pass
    problem = mesh.broadcast_from_first(problem)
    if failed:
        raise failed
    if problem:
        raise OSError(f"rank 0 could not write the checkpoint to {os.fspath(save_directory)!r} ({problem}).")


def _write(model: Any, folder: Path, max_bytes: int, tensors: Iterator[tuple[str, Tensor | None]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)  # that of all ranks stays the same
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    new, described = set(layout_of(model).new), dict[int, Described]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in new:  # and tied ones are written once
            described.setdefault(id(tensor), Described(name, tuple(tensor.shape), tensor.dtype))
    files = plan_files(list(described.values()), max_bytes)
    parts = [folder / f"{file}.part" for file in files]
    sizes = {one.key: one.num_bytes for one in described.values()}
    wanted = ((name, tensor) for name, tensor in tensors if name in sizes)
    try:
        with tqdm(total=sum(sizes.values()), desc="saving", unit="B", unit_scale=True, delay=2) as bar:
            for part, group in zip(parts, files.values(), strict=True):
                write_file(part, group, wanted, on_bytes=bar.update)
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    for stale in folder.iterdir():
        if WEIGHTS.fullmatch(stale.name) and stale.name not in files:
            stale.unlink()
    for part in parts:
        part.replace(part.with_suffix(""))
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(files), indent=2, sort_keys=True))


def _num_bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    unit = size[-2:].upper()
    if unit not in UNITS or not size[:-2].strip().isdigit():
        raise ValueError(f"max_shard_size is {size!r}. Give bytes, or a number with {', '.join(UNITS)}, such as '5GB'.")
    return int(size[:-2]) * UNITS[unit]
