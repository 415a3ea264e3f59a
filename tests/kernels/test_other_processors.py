"""The native library on processors that are emulated: built by a cross compiler, and run beside plain loops."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.built import SOURCES, built

ARM = "aarch64-linux-gnu-gcc"
PROCESSORS = {
    "this one": ("cc", [], []),
    "64-bit ARM": (ARM, [], ["qemu-aarch64", "-cpu", "cortex-a72"]),
    "64-bit ARM with bfloat16": (ARM, [], ["qemu-aarch64", "-cpu", "max"]),
    "64-bit ARM of 2019": (ARM, ["-march=armv8.4-a"], ["qemu-aarch64", "-cpu", "max"]),
    "64-bit ARM of 2020": (ARM, ["-mcpu=neoverse-v1"], ["qemu-aarch64", "-cpu", "max"]),
    "64-bit ARM with extensions": (ARM, ["-march=armv8-a+crc+crypto"], ["qemu-aarch64", "-cpu", "cortex-a72"]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_beside_plain_loops(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    compiler, chosen, emulator = PROCESSORS[name]
    if missing := [one for one in (compiler, *emulator[:1]) if not shutil.which(one)]:
        pytest.skip(f"{missing[0]} is not installed")
    options = [*chosen, "-O3", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-static", f"-I{SOURCES}"]
    program = built(tmp_path_factory, Path(__file__).with_name("by_itself.c"), compiler, *options)
    run = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert run.stdout.startswith("best 3" if "-cpu max" in " ".join(emulator) else "best")
    # Negative control: one weight is off.
    run = subprocess.run([*emulator, str(program), "off"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "should be" in run.stdout
