"""Runs the notebooks beside this file and saves them with their outputs: `python docs/notebooks/save.py`.

Needs nbclient, ipykernel and ipywidgets. Names of notebooks as arguments choose some of them.
"""

from __future__ import annotations

import html
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
"""The kind of output that shows a widget, which lives as long as its kernel."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def executed(notebook: NotebookNode) -> tuple[NotebookNode, dict[str, Any]]:
    """The notebook with the outputs of a run, and the last state of each widget by its id.

    The kernel is this interpreter, in an empty folder, offline, on one thread. Raises `CellExecutionError` if a cell
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": paths, "IPYTHONDIR": folder}
        # Sockets in files, which notebooks that run at the same time cannot confuse.
        sockets = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        client = NotebookClient(notebook, kernel_name="python3", timeout=300, coalesce_streams=True, config=sockets)
        client.execute(cwd=folder, env=environment)
        return client.nb, client.widget_state


def still(model: str, widgets: dict[str, Any]) -> NotebookNode:
    """A progress bar of tqdm in its last state, as HTML that needs no kernel."""
    names = [name.removeprefix("IPY_MODEL_") for name in widgets[model]["children"]]
    left, bar, right = (widgets[name] for name in names)
    # tqdm writes spaces as wide as a digit.
    before, after = (one["value"].replace("\u2007", " ").strip() for one in (left, right))
    progress = f"<progress style='vertical-align:middle' value='{bar['value']:g}' max='{bar['max']:g}'></progress>"
    return NotebookNode({"text/html": f"{before} {progress} {after}", "text/plain": html.unescape(f"{before} {after}")})


def saved(notebook: NotebookNode, widgets: dict[str, Any]) -> NotebookNode:
    """The notebook as it is saved: progress bars stand still, and nothing is there of when and where it ran."""
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if WIDGET in output.get("data", {}):
                output.data = still(output.data[WIDGET]["model_id"], widgets)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    return notebook


def main() -> None:
    """Run and save all of them, or those that are named."""
    for path in NOTEBOOKS:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            notebook = nbformat.read(path, as_version=4)
            nbformat.write(saved(*executed(notebook)), path)


if __name__ == "__main__":
    main()
