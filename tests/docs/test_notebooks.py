"""The notebooks run from first cell to last, compute what they say, and are saved with outputs that look right."""

from __future__ import annotations

import copy
import json
import re
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
SAVE = runpy.run_path(str(FOLDER / "save.py"))
WIDGET = SAVE["WIDGET"]
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

# Run after the last cell of a notebook, these tell what its cells found, and what should differ.
FACTS = {
    "compose_and_explain": """
with torch.no_grad():
    for layer in fast(model).model.layers:
        layer.self_attn.sinks.fill_(-torch.inf)
    without_sinks = model(tokens).logits
    differences = [(one - before).abs().max().item() for one in (after, packed(tokens).logits, without_sinks)]
facts = {"differences": differences, "bytes": [packed_bytes, dense_bytes]}
""",
    "serve_and_stream": """
alone = [model.generate(torch.tensor([one]), max_new_tokens=8, do_sample=False)[0, 97:].tolist() for one in prompts]
facts = {"streamed": streamed, "generated": generated, "arrivals": arrivals, "alone": alone, "answers": answers}
facts |= {"greedy": greedy.tokens, "sampled": sampled.tokens, "prefix_tokens": stats.prefix_tokens}
""",
    "finetune_and_merge": """
from transformers import AutoModelForCausalLM
plain = AutoModelForCausalLM.from_pretrained(scratch / "merged", dtype=torch.float32).float()
with torch.no_grad():
    plain_loss = plain(rows, labels=rows).loss.item()
differences = [(merged(rows).logits - one).abs().max().item() for one in (adapted, base)]
trained_steps = sum(step.grad_norm is not None for step in monitor.steps)
facts = {"losses": losses, "plain_loss": plain_loss, "differences": differences, "trained_steps": trained_steps}
""",
}


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def kinds(notebook: NotebookNode) -> list[list[tuple[str, str, list[str]]]]:
    """What each cell puts out: the type of each output, its stream, and its MIME types."""
    return [
        [(one.output_type, one.get("name", ""), sorted(one.get("data", ()))) for one in cell.get("outputs", ())]
        for cell in notebook.cells
    ]


def ran(name: str) -> tuple[NotebookNode, dict[str, Any], dict[str, Any]]:
    """A notebook with its outputs, the state of its widgets, and its facts."""
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(f"{FACTS[name]}\nimport json\nprint('facts:', json.dumps(facts))"))
    notebook, widgets = SAVE["executed"](notebook)
    told = "".join(output.get("text", "") for output in notebook.cells.pop().outputs)
    return notebook, widgets, json.loads(re.findall("^facts: (.*)$", told, re.MULTILINE)[0])


def check_saved(name: str, notebook: NotebookNode, widgets: dict[str, Any]) -> None:
    """What is saved has outputs of the kinds that running gives, and progress was a widget while it ran."""
    live = [output.data for output in outputs_of(notebook) if WIDGET in output.get("data", {})]
    found = SAVE["saved"](copy.deepcopy(notebook), widgets)
    assert kinds(read(name)) == kinds(found)
    assert live
    assert not any(WIDGET in output.get("data", {}) for output in outputs_of(found))


def test_composing_keeps_the_logits() -> None:
    notebook, widgets, facts = ran("compose_and_explain")
    wrapped, packed, without_sinks = facts["differences"]
    assert wrapped < 1e-5
    assert packed < 1e-5
    assert without_sinks > 0.1
    packed_bytes, dense_bytes = facts["bytes"]
    assert packed_bytes < 0.5 * dense_bytes
    check_saved("compose_and_explain", notebook, widgets)


def test_streams_are_what_generate_gives() -> None:
    notebook, widgets, facts = ran("serve_and_stream")
    assert facts["streamed"] == facts["generated"]
    assert len(facts["streamed"]) == 12
    assert facts["greedy"] == facts["generated"][:6] != facts["sampled"]
    assert facts["answers"] == facts["alone"]
    assert len({tuple(answer) for answer in facts["answers"]}) > 1
    # Each of 16 prompts finds six pages of 16 tokens.
    assert facts["prefix_tokens"] == 16 * 96
    for name in ("greedy", "sampled"):
        assert [token for who, token in facts["arrivals"] if who == name] == facts[name]
    changes = [before[0] != after[0] for before, after in pairwise(facts["arrivals"])]
    assert sum(changes) > 1, "one stream came after the other"
    check_saved("serve_and_stream", notebook, widgets)


def test_the_merged_model_is_the_adapted_one() -> None:
    notebook, widgets, facts = ran("finetune_and_merge")
    assert facts["losses"][-1] < 0.2 * facts["losses"][0]
    from_adapted, from_base = facts["differences"]
    assert from_adapted < 1e-3 < 1 < from_base
    assert facts["plain_loss"] < 0.5 * facts["losses"][0]
    assert facts["trained_steps"] == 20
    check_saved("finetune_and_merge", notebook, widgets)


def test_a_cell_that_fails_is_told() -> None:
    cell = nbformat.v4.new_code_cell("assert 1 == 2, 'a cell failed'")
    with pytest.raises(CellExecutionError, match="a cell failed"):
        SAVE["executed"](nbformat.v4.new_notebook(cells=[cell]))


def test_each_notebook_is_run_by_a_test() -> None:
    assert sorted(FACTS) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_saved_notebooks_look_right(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {"stream stdout", "execute_result ", "display_data "} == {
        f"{output.output_type} {output.get('name', '')}" for output in outputs_of(notebook)
    }
    pages = [output.data["text/html"] for output in outputs_of(notebook) if "text/html" in output.get("data", {})]
    assert sum("<table>" in page for page in pages) > 0
    for page in pages:
        assert "color" not in page, "it could vanish in dark themes"
        assert "background" not in page
    bars = [page for page in pages if "<progress" in page]
    assert bars
    assert all(page.startswith(("100%", "writing", "training")) and "100%" in page for page in bars)
    written = json.dumps(outputs_of(notebook))
    assert not re.search(r"/tmp|/root|/home", written), "a path of the machine"
