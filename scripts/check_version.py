"""Says whether the tree can be released as a version: `python scripts/check_version.py 0.1.0`, in the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PLACES = {
    "gptoss_opt/version.py": r'^__version__ = "{}"$',
    "CITATION.cff": r"^version: {}$",
    "CHANGELOG.md": r"^## \[{}\] - \d{{4}}-\d\d-\d\d$",
}
"""Files that name the version, and the line that does so."""


def unready(root: Path, version: str) -> list[str]:
    """The files that do not name the version, in words."""
    return [
        f"{name} has no line that matches {line}"
        for name, pattern in PLACES.items()
        if not re.search(line := pattern.format(re.escape(version)), (root / name).read_text(), re.MULTILINE)
    ]


if __name__ == "__main__":
    if found := unready(Path(), sys.argv[1]):
        sys.exit("\n".join(found))
