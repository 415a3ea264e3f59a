"""What tests build with a C compiler: once for all processes that run the tests, as it takes long."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from gptoss_opt.kernels import native

SOURCES = Path(native.__file__).parent / "c"


def built(factory: pytest.TempPathFactory, source: Path, *command: str) -> Path:
    """The file that a compiler makes of a source, with these options."""
    # Processes of pytest-xdist have folders of their own, in one that they share.
    folder = factory.getbasetemp()
    shared = folder.parent if folder.name.startswith("popen-") else folder
    file = shared / re.sub(r"\W+", "_", " ".join([source.stem, *command]).replace(str(SOURCES), ""))
    with FileLock(f"{file}.lock"):
        if not file.exists():
            subprocess.run([*command, str(source), "-o", str(file), "-lm", "-lpthread"], check=True)
    return file
