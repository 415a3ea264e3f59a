"""Checkpoints with random damage: a model, or a `CheckpointError` that names the file; never anything else."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_opt import CheckpointError, load, with_mxfp4_experts
from gptoss_opt.testing import random_checkpoint
from tests.helpers import ids

COUNT = 120
VALUES: list[Any] = [-1, 0, 1, 3, 7, 2.5, -0.5, 1e30, 2**40, float("nan"), True, None, "x", "1", [], [1], {}, {"a": 1}]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("good") / "tiny")


def edit(file: Path, draw: random.Random, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def a_number(folder: Path, draw: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        held = draw.choice([config, config, config, config["rope_scaling"]])
        held[draw.choice(sorted(held))] = draw.choice(VALUES)

    edit(folder / "config.json", draw, change)


def a_key(folder: Path, draw: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        del config[draw.choice(sorted(config))]

    edit(folder / "config.json", draw, change)


def the_index(folder: Path, draw: random.Random) -> None:
    def change(index: dict[str, Any]) -> None:
        key = draw.choice(sorted(index["weight_map"]))
        index["weight_map"][key] = draw.choice(
            [*VALUES, "../x", "/dev/zero", *sorted(set(index["weight_map"].values()))]
        )

    edit(folder / "model.safetensors.index.json", draw, change)


def some_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob("*")))


def a_byte(folder: Path, draw: random.Random) -> None:
    file = some_file(folder, draw)
    content = bytearray(file.read_bytes())
    # Of a tensor file rather the header: a changed weight is a weight.
    content[draw.randrange(min(len(content), 4096))] = draw.randrange(256)
    file.write_bytes(content)


def a_cut(folder: Path, draw: random.Random) -> None:
    file = some_file(folder, draw)
    os.truncate(file, draw.randrange(file.stat().st_size))


def a_link(folder: Path, draw: random.Random) -> None:
    file = some_file(folder, draw)
    file.unlink()
    file.symlink_to(draw.choice([folder / "nowhere", folder, file, some_file(folder, draw)]))


def a_hole(folder: Path, draw: random.Random) -> None:
    some_file(folder, draw).unlink()


DAMAGES = (a_number, a_number, a_number, a_key, the_index, a_byte, a_cut, a_link, a_hole)


def test_random_damage(good: Path, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(COUNT):
        seed = secrets.randbits(32)
        draw = random.Random(seed)
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        damage = draw.choice(DAMAGES)
        damage(folder, draw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of transformers, on options it does not know
                model = load(folder, *draw.choice([(), (with_mxfp4_experts(),)]))
        except CheckpointError as error:
            outcomes["refused" if str(folder) in str(error) else f"seed {seed}, {damage.__name__}: {error}"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {damage.__name__}: {type(error).__name__}: {error}") from error
        else:
            outcomes["loaded"] += 1
            if damage in (a_key, a_number):
                model(ids(1, 5).clamp(max=model.config.vocab_size - 1))
        shutil.rmtree(folder)
    assert set(outcomes) == {"refused", "loaded"}, outcomes
    assert outcomes["refused"] > COUNT / 4, outcomes


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("vocab_size", -5, "a whole number of at least 1"),
        ("num_local_experts", 0, "a whole number of at least 1"),
        ("pad_token_id", 4096, "a whole number of at least -256, at most 255"),
        ("num_experts_per_tok", 9, "a whole number of at least 1, at most 4"),
        ("num_attention_heads", 0, "a whole number of at least 1"),
        ("num_key_value_heads", 3, "a divisor of num_attention_heads, 4"),
        ("head_dim", 15, "even"),
        ("sliding_window", 0, "a whole number of at least 1"),
        ("rope_theta", {"a": 1}, "a number of at least 1"),
        ("rope_scaling.rope_type", 3, "one of default, "),
        ("rope_scaling.factor", 0, "a number of at least"),
        ("attention_dropout", 1.5, "a number of at least 0, at most 1"),
    ],
)
def test_impossible_numbers(key: str, value: Any, wanted: str, good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "mine"))
    content = json.loads((folder / "config.json").read_text())
    content.pop("experts_per_token")  # a second name of num_experts_per_tok
    *path, name = key.split(".")
    held = content[path[0]] if path else content
    held[name] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder / 'config.json'}: ")
    for part in (name, repr(value), wanted):
        assert part in said, said
