"""A GPT-OSS checkpoint: a folder, or a name on the Hugging Face hub, and the tensors of its safetensors files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import GptOssConfig

from ..model.build import ROPE_TYPES, class_of
from ..model.host import MODEL_TYPE
from .numbers import wrong_numbers
from .reader import DAMAGED, CheckpointError, TensorInfo, as_checkpoint_errors, parse_object, read_header, read_tensor

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been looked through, and can be read tensor by tensor. Holds no file open.

    Attributes:
        folder: where its files are.
        config: as `from_pretrained` would read it; this checkpoint's own.
        tensors: all tensors of all its files by key, in the order in which they lie there.
    """

    folder: Path
    config: GptOssConfig = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
        """Find a checkpoint, and check its config, its index and the headers of all its files. No tensor is read.

        Args:
            path_or_id: a folder, or else a name on the Hugging Face hub such as "openai/gpt-oss-20b". What is in the
                hub's cache is not downloaded again, and with HF_HUB_OFFLINE=1 nothing is.
            revision: the branch, tag or commit on the hub; a folder has none.

        Raises:
            CheckpointError: it cannot be had, is not of a GPT-OSS model, or a file is missing or damaged.

        Example:
            >>> checkpoint = Checkpoint.open(path)
            >>> checkpoint.config.hidden_size, len(checkpoint.tensors)
            (128, 60)
        """
        folder = _folder(path_or_id, revision)
        with as_checkpoint_errors(folder):
            config = _config(folder)
            config.name_or_path = os.fspath(path_or_id)  # as in from_pretrained; peft writes it into its adapters
            return cls(folder, config, _tensors(folder, getattr(config, "transformers_weights", None)))

    def read(
        self,
        key: str,
        index: tuple[slice, ...] = (),
        *,
        out: Tensor | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Tensor:
        """A tensor, or a slice of it, as `tensor[index]` would give it: a new contiguous one on cpu, or `out`.

        Reads from the file what the slice needs, straight into the tensor. Only gaps of less than 64 KiB between
        runs of less than 64 KiB are read over rather than skipped.

        Args:
            key: its name in the checkpoint.
            index: a slice with a step of one for each of the first dimensions; the others are whole.
            out: read into this contiguous cpu tensor, of the shape and dtype of the slice.
            on_bytes: called, in the caller's thread, with the number of bytes whenever some have been read, at most 16
                MiB.

        Raises:
            CheckpointError: there is no such key, or the file has been moved or cut since it was opened.
            ValueError: `index` or `out` does not fit the tensor.

        Example:
            >>> checkpoint = Checkpoint.open(path)
            >>> checkpoint.read("model.layers.0.mlp.experts.down_proj_scales", (slice(0, 2), slice(0, 32))).shape
            torch.Size([2, 32, 5])
        """
        if key not in self.tensors:
            similar = difflib.get_close_matches(key, self.tensors, n=3)
            advice = f"Similar: {', '.join(map(repr, similar))}." if similar else "See the keys in checkpoint.tensors."
            raise CheckpointError(f"{self.folder}: no tensor has the key {key!r}. {advice}")
        return read_tensor(self.tensors[key], index, out=out, on_bytes=on_bytes)


def _folder(path_or_id: str | os.PathLike[str], revision: str | None) -> Path:
    name = os.fspath(path_or_id)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name}: a file. Give the folder of the checkpoint.")
    if not isinstance(path_or_id, str):
        raise CheckpointError(f"{name}: there is no such folder. Give the folder of a checkpoint, or its name as str.")

    import huggingface_hub

    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=offline,  # not left to the client, of which some versions ask for a commit's files even so
            allow_patterns=["*.json", "*.safetensors"],
            # "*" takes slashes too; the released repositories hold the same weights again in original/ and metal/.
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # those of its HTTP library too, which differs between versions
        at = f" at revision {revision!r}" if revision else ""
        problem = f"there is no such folder, and the hub client found no such model{at} ({_line(error)})"
        advice = "Check the name, or give the folder of a checkpoint."
        if offline:
            advice += " HF_HUB_OFFLINE is set, and it is not in the cache: unset that to download it."
        raise CheckpointError(f"{name}: {problem}. {advice}") from error
    return Path(found)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def _config(folder: Path) -> GptOssConfig:
    file = folder / CONFIG
    if not file.is_file():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{file}: missing; the folder holds {held}. Give the folder of a whole checkpoint.")
    model_type = parse_object(file, file.read_bytes()).get("model_type")
    if model_type != MODEL_TYPE:
        raise CheckpointError(f"{file}: model_type is {model_type!r}. Give a checkpoint of a {MODEL_TYPE} model.")
    try:
        config = GptOssConfig.from_pretrained(folder)
    except Exception as error:  # its validation has error classes of its own, which are not ValueErrors
        raise CheckpointError(f"{file}: no valid config ({_line(error)}). Correct it or download it again.") from error
    for key, value, wanted in wrong_numbers(config, ROPE_TYPES):
        raise CheckpointError(f"{file}: {key} is {value!r}, and must be {wanted}. Correct it or download it again.")
    try:
        class_of(config)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}. Correct it or download it again.") from error
    return config


def _tensors(folder: Path, weights: object) -> dict[str, TensorInfo]:
    """All tensors, of the files that `from_pretrained` would read.

    It takes the file or index that the config names as transformers_weights, else the single file, else the index; and
    with an index all tensors of the files that are in it, listed or not.
    """
    names = [SINGLE, INDEX]
    if weights is not None:
        names = [_plain_name(folder / CONFIG, "transformers_weights", weights)]
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        problem = f"there is no {' and no '.join(names)}"
        held = ", ".join(sorted(file.name for file in folder.glob("*.*") if file.suffix in (".bin", ".safetensors")))
        advice = "Download it again, or write it with save_pretrained, in safetensors."
        raise CheckpointError(f"{folder}: {problem}; weights there are {held or 'none'}. {advice}")
    return _sharded(folder / name) if name.endswith(".index.json") else read_header(folder / name)


def _plain_name(file: Path, key: str, name: object) -> str:
    """The name of a file beside `file`, in which `key` holds it; never one that leads elsewhere."""
    if not isinstance(name, str) or name in ("", "..") or "\\" in name or Path(name).name != name:
        problem = f"{name!r} is not a plain file name"
        raise CheckpointError(f"{file}: key {key!r}: {problem}. Files of a checkpoint lie in its folder: correct it.")
    return name


def _sharded(index: Path) -> dict[str, TensorInfo]:
    weight_map = parse_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: key 'weight_map' is not an object of keys and file names. {DAMAGED}")
    keys: dict[str, list[str]] = {}
    for key, value in weight_map.items():
        keys.setdefault(_plain_name(index, key, value), []).append(key)

    missing = sorted(name for name in keys if not (index.parent / name).is_file())
    if missing:
        lost = keys[missing[0]]
        more = f" (and {len(missing) - 1} more files)" if len(missing) > 1 else ""
        problem = f"missing{more}; by {index.name} it holds {len(lost)} tensors, {lost[0]!r} first"
        raise CheckpointError(f"{index.parent / missing[0]}: {problem}. Download or copy it again.")

    tensors: dict[str, TensorInfo] = {}
    for name in sorted(keys):
        file = index.parent / name
        header = read_header(file)
        for key in keys[name]:
            if key not in header:
                problem = f"not in this file, where {index.name} says it is"
                raise CheckpointError(f"{file}: key {key!r}: {problem}. Download both files again.")
        for key in header.keys() & tensors.keys():
            problem = f"also in {tensors[key].file.name}, and may differ there"
            raise CheckpointError(f"{file}: key {key!r}: {problem}. Download the checkpoint again.")
        tensors |= header
    return tensors
