"""Says whether a folder holds what a release consists of: `python scripts/check_dist.py dist`, in the repository.

That is one source distribution with every file that git knows, and wheels that serve every Python 3 on their platform.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

NATIVE = "gptoss_opt/kernels/native/_native.so"
WHEEL = re.compile(r"gptoss_opt-[\w.]+-py3-none-(manylinux_\d+_\d+|macosx_\d+_\d+)\w*\.whl")


def missing_from(sdist: Path) -> list[str]:
    """The files that git knows and the source distribution lacks."""
    tracked = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    return sorted(set(tracked.split("\0")) - held - {""})


def wrong_with(wheel: Path) -> list[str]:
    """What is wrong with a wheel, in words."""
    wrong = [] if WHEEL.fullmatch(wheel.name) else ["its name is not py3-none-manylinux... or py3-none-macosx..."]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if NATIVE not in names:
        wrong.append(f"it lacks {NATIVE}: there was no C compiler")
    if "gptoss_opt/py.typed" not in names:
        wrong.append("it lacks py.typed")
    strays = [name for name in names if not re.match(r"gptoss_opt(-[\w.]+\.dist-info)?/", name) or name.endswith(".h")]
    return wrong + [f"it holds {name}, which is no part of the package" for name in strays]


def problems(folder: Path) -> list[str]:
    """All that keeps the folder's files from being released."""
    sdists, wheels = sorted(folder.glob("*.tar.gz")), sorted(folder.glob("*.whl"))
    found = [] if len(sdists) == 1 and wheels else [f"{len(sdists)} source distributions and {len(wheels)} wheels"]
    found += [f"{sdist.name} lacks {name}: say so in MANIFEST.in" for sdist in sdists for name in missing_from(sdist)]
    return found + [f"{wheel.name}: {reason}" for wheel in wheels for reason in wrong_with(wheel)]


if __name__ == "__main__":
    if found := problems(Path(sys.argv[1])):
        sys.exit("\n".join(found))
