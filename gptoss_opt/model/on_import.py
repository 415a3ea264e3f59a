"""Changes to modules of others that are made when those are imported, and not before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Change = Callable[[ModuleType], None]


def when_imported(name: str, change: Change) -> None:
    """Make a change to a module: now if it is imported already, else when it is."""
    if name in sys.modules:
        change(sys.modules[name])
        return
    waiting = next((one for one in sys.meta_path if isinstance(one, OnImport) and one.name == name), None)
    if waiting is None:
        sys.meta_path.insert(0, OnImport(name, [change]))
    else:
        waiting.changes.append(change)


@dataclass(eq=False)
class OnImport(MetaPathFinder):
    """Finds a module where Python does, and changes it once it has run."""

    name: str
    changes: list[Change]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            for change in self.changes:
                change(module)

        vars(spec.loader)["exec_module"] = run_and_change
        return spec
