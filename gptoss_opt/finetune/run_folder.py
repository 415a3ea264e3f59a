"""The folder of a finetuning: what it was told, a line for each step, and its last two checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import FREE, FinetuneError, Options

DATA = "data_sha256"
RUN, LOG, STATE = "run.json", "log.jsonl", "training_state.pt"
CHECKPOINT = re.compile(r"step-(\d{6,})")
KEPT = 2
"""How many checkpoints are kept."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    def told(self) -> dict[str, Any]:
        """The options of the run, and the SHA-256 of its data. Raises `FinetuneError` if there is no run."""
        try:
            return dict(json.loads((self.path / RUN).read_text()))
        except FileNotFoundError as error:
            raise FinetuneError(f"{self.path} holds no run to go on with. Leave --resume out to begin one.") from error

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints by the number of steps taken, in growing order."""
        found = {
            int(match[1]): file
            for file in (self.path.iterdir() if self.path.is_dir() else ())
            if (match := CHECKPOINT.fullmatch(file.name)) and (file / STATE).is_file()
        }
        return dict(sorted(found.items()))

    def check(self, options: Options, data_sha256: str, *, resume: bool) -> None:
        """Raise `FinetuneError` if a run cannot begin here, or go on with these options on these data."""
        if self.path.exists() and not self.path.is_dir():
            raise FinetuneError(f"{self.path} is a file. Give --output a folder, which is made if it is not there.")
        if not resume:
            if self.checkpoints():
                raise FinetuneError(
                    f"{self.path} holds checkpoints of a run. Give --resume to go on with it, or another --output."
                )
            return
        told, asked = self.told(), _as_json(options, data_sha256)
        changed = [f"{key} was {told.get(key)!r}, now {asked[key]!r}" for key in asked if asked[key] != told.get(key)]
        if changed := [one for one in changed if one.partition(" ")[0] not in FREE]:
            raise FinetuneError(
                f"{self.path}: a run goes on with what it began with, and {'; '.join(changed)}. Leave that out, or "
                "begin a run with another --output."
            )

    def begin(self, options: Options, data_sha256: str) -> None:
        """Note what the run is told. Raises `FinetuneError` if nothing can be written here."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / RUN, json.dumps(_as_json(options, data_sha256), indent=2) + "\n")
        except OSError as error:
            raise FinetuneError(f"{self.path} cannot be written to ({error}). Give another --output.") from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line for a step."""
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of all steps."""
        return [json.loads(line) for line in (self.path / LOG).read_text().splitlines()]

    def forget(self, step: int) -> None:
        """Drop the lines of what came after a step, and what a run that was killed was about to write."""
        for part in self.path.glob("*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        lines = (self.path / LOG).read_text().splitlines(keepends=True) if (self.path / LOG).is_file() else []
        # Of the last line a part alone may have been written.
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        _write(self.path / LOG, "".join(whole))

    def save(self, step: int, write: Callable[[Path], object]) -> Path:
        """Let `write` fill a checkpoint, which is there once it is whole, and remove old ones.

        Raises:
            FinetuneError: it could not be written.
        """
        folder = self.path / f"step-{step:06}"
        part = folder.with_name(f"{folder.name}.part")
        try:
            part.mkdir()
            write(part)
            part.replace(folder)
        except OSError as error:
            last = next(reversed(self.checkpoints().values()), None)
            kept = f"The last one is {last}" if last else "There is none before"
            raise FinetuneError(f"the checkpoint {folder} could not be written ({error}). {kept}.") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in list(self.checkpoints().values())[:-KEPT]:
            shutil.rmtree(old)
        return folder


def continued(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run in the folder `output` was told, with what is given now. Raises `FinetuneError` if there is no run."""
    told = RunFolder(Path(given.get("output", Options.output))).told()
    return {**{name: value for name, value in told.items() if name != DATA and value is not None}, **given}


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _as_json(options: Options, data_sha256: str) -> dict[str, Any]:
    return dict(json.loads(json.dumps({**vars(options), DATA: data_sha256})))


def _write(file: Path, content: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(content)
    part.replace(file)
