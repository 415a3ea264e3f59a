"""An ordinary checkpoint from a model that several ranks hold together, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..core import held_by, layout_of, mesh_of
from ..distributed import ModelMesh
from ..layout import Split
from ..model.saving import config_to_save, refuse_mapped
from .writer import write_files

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def gather_state_dict(model: nn.Module, *, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
    """The whole tensors of a model that several ranks hold together, one after the other.

    Every rank must go through all of it. Rank 0 gets the tensors, in the order of `state_dict()`, on the model's
    device; the others None. Placements of experts are undone: all tensors are as they are in a model that was never
    sharded, packed ones packed. Of a model that is not sharded each process gets its own tensors.

    Args:
        model: a model with `shard_tensor_parallel` or `shard_experts`, or without.
        only: the names of the tensors that are wanted; all by default.

    Yields:
        name, and tensor or None.

    Raises:
        ValueError: something else, but FSDP over a data parallel axis, has moved a sharded model's parameters since.

    Example:
        >>> shapes = {name: tensor.shape for name, tensor in gather_state_dict(model) if tensor is not None}
        >>> shapes["model.embed_tokens.weight"]
        torch.Size([128, 64])
    """
    mesh, splits = mesh_of(model), splits_of(model)
    for name, tensor in cast(dict[str, Tensor], model.state_dict(keep_vars=True)).items():
        if only is not None and name not in only:
            continue
        if mesh is None and isinstance(tensor, DTensor):  # as FSDP holds it
            whole = cast(DTensor, tensor.detach()).full_tensor()
            yield name, whole if ModelMesh(tensor.device_mesh).is_first else None
            continue
        if mesh is None:
            yield name, tensor.detach()
            continue
        if not isinstance(tensor, DTensor):  # a buffer
            yield name, tensor.detach() if mesh.is_first else None
            continue
        try:
            local = mesh.local(tensor) if mesh.holds(tensor) else mesh.gather_outer(tensor, splits.get(name, []))
        except ValueError as error:
            raise ValueError(f"{name}: {error}. Save with what has put it there, or before it.") from error
        # Replicas of the model have nothing to add.
        yield name, mesh.gather(local, splits.get(name, [])) if mesh.in_first_replica else None


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
    options.pop("save_peft_format", None)
    refuse_options(
        options,
        {"state_dict": None},
        "a sharded model. Save without it: what is written is an ordinary checkpoint, which transformers loads and "
        "saves as you like.",
    )
    described, tensors, config = _described(model), gather_state_dict(model), config_to_save(model)
    config.dtype = str(model.dtype).removeprefix("torch.")

    def write(folder: Path) -> None:
        write_checkpoint(model, folder, config, described, tensors, max_shard_size=max_shard_size)

    write_on_first(model, tensors, save_directory, write)


def refuse_options(options: Mapping[str, Any], served: Mapping[str, Any], of_what: str) -> None:
    """Raise `ValueError` for an option of transformers' `save_pretrained` that asks for more than is served."""
    harmless = {"push_to_hub": False, "variant": None, "distributed_checkpoint": False, **served}
    ignored = {"save_function", "token", "max_shard_size", "save_original_format", "safe_serialization"}
    for option, value in options.items():
        if option not in ignored and (option not in harmless or value is not harmless[option]):
            raise ValueError(f"save_pretrained({option}={value!r}) is not served on {of_what}")


def ranks_of(model: nn.Module) -> ModelMesh | None:
    """The ranks that hold a model together, as wrappers or FSDP spread it; None if this process holds all of it."""
    under_fsdp = (ModelMesh(one.device_mesh) for one in model.parameters() if isinstance(one, DTensor))
    mesh: ModelMesh | None = mesh_of(model)
    return mesh or next(under_fsdp, None)


def write_on_first(
    model: nn.Module,
    tensors: Iterator[tuple[str, Tensor | None]],
    path: str | os.PathLike[str],
    write: Callable[[Path], object],
) -> None:
    """Let the first of the ranks that hold a model `write` what all gather as `tensors`; if it fails, all of them do.

    Raises:
        OSError: on every other rank, if the first could not write; on the first itself what went wrong there.
    """
    mesh = ranks_of(model)
    problem, failed = None, None
    if mesh is None or mesh.is_first:
        try:
            write(Path(path))
        except Exception as error:  # whatever it is: the others are not to wait, and it is raised below
            problem, failed = f"{type(error).__name__}: {error}", error
    for _ in tensors:  # the others', and what is left after a failure
        pass
    if mesh is not None:
        problem = mesh.broadcast_from_first(problem)
    if failed:
        raise failed
    if problem:
        raise OSError(f"rank 0 could not write the checkpoint to {os.fspath(path)!r} ({problem}).")


def _described(model: Any) -> dict[str, Tensor]:
    """The tensors that are saved, without values: not those that wrappers brought, and tied ones once."""
    new, first = set(layout_of(model).new), dict[int, str]()
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in new}
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
        if first.setdefault(id(tensor), name) == name
    }


def write_checkpoint(
    model: Any,
    folder: Path,
    config: Any,
    described: Mapping[str, Tensor],
    tensors: Iterator[tuple[str, Tensor | None]],
    *,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write an ordinary checkpoint, one tensor after the other; files are put in place when all are written.

    Args:
        model: what it is of.
        folder: where it goes; it is made where it does not exist.
        config: what its config.json says; changed here.
        described: the tensors that are written, on the meta device.
        tensors: those, and perhaps others, with their values.
        max_shard_size: of one file, in bytes or as "5GB".
    """
    refuse_mapped(model, folder)
    # The splitting of transformers. It takes tensors without values.
    split = split_torch_state_dict_into_shards(
        dict(described), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    files = {
        folder / f"{name}.part": {key: described[key] for key in keys}
        for name, keys in split.filename_to_tensors.items()
    }
    wanted = ((name, tensor) for name, tensor in tensors if name in described)
    try:
        with tqdm(total=split.metadata["total_size"], desc="saving", unit="B", unit_scale=True, delay=2) as bar:
            write_files(files, wanted, on_bytes=bar.update)
    except BaseException:
        for part in files:
            part.unlink(missing_ok=True)
        raise
    for stale in folder.iterdir():
        if WEIGHTS.fullmatch(stale.name) and stale.name not in split.filename_to_tensors:
            stale.unlink()
    for part in files:
        part.replace(part.with_suffix(""))
    if split.is_sharded:
        count = sum(tensor.numel() for tensor in described.values())
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
