"""The page docs/benchmarks.md: every chart by hardware, with what it was measured on and by which command."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import RESULTS

from .rows import CHARTS, Chart, Lines

HARDWARE = {
    "zen-5": "AMD EPYC (Zen 5)",
    "zen-4": "AMD EPYC (Zen 4)",
    "xeon-with-amx": "Intel Xeon with AMX",
    "nvidia-h100-80gb-hbm3": "NVIDIA H100",
}
"""By how files are named, in the order of the page."""
HEAD = """\
# Benchmarks

Each chart is drawn from a file in `benchmarks/results/`, by `python -m benchmarks.charts`. Its caption says on which
processor, with which versions, at which commit and by which command it was measured. A case is reported only after its
output was verified against the peer's. Peers and ours run in turn; ratios are medians over the turns.

**A figure holds on the processor that it names.** Where a processor is missing below, nothing was measured there. What
bounds each figure, and what was learned on the way, is in the [notes](../benchmarks/README.md).
"""


def measured() -> list[tuple[Chart, str, Lines]]:
    """Each chart with the hardware that there are results of, and their lines."""
    found: list[tuple[Chart, str, Lines]] = []
    for kind in HARDWARE:
        for chart in CHARTS:
            path = RESULTS / f"{chart.benchmark}-{kind}.jsonl"
            if path.exists():
                found.append((chart, kind, [json.loads(line) for line in path.read_text().splitlines()]))
    return found


def picture(chart: Chart, kind: str) -> str:
    """The name of a chart's file, in docs/images/charts/."""
    return f"{chart.name}-{kind}.svg"


def title(chart: Chart, kind: str) -> str:
    """What stands above a chart."""
    return f"{chart.title} ({HARDWARE[kind]})"


def caption(line: Mapping[str, Any], kind: str) -> str:
    """Hardware, versions, commit and command of a line, in Markdown."""
    versions = ", ".join(f"{name} {line[name]}" for name in ("torch", "transformers", "gptoss_opt"))
    when = f"commit {line['commit']}; {line['date']}"
    return f"{HARDWARE[kind]}, {line['threads']} threads; {versions}; {when}; `{line['command']}`"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    charts = measured()
    for kind, name in HARDWARE.items():
        parts.append(f"## {name}\n")
        for chart, of, lines in charts:
            if of == kind:
                rows = chart.rows(lines)
                image = f"![{title(chart, kind)}](images/charts/{picture(chart, kind)})"
                parts += [f"### {chart.title.split(':')[0]}{'' if chart.name != 'finetune-memory' else ': memory'}\n"]
                parts += [textwrap.fill(chart.about, 118) + "\n", image + "\n", f"*{caption(lines[0], kind)}*\n"]
                assert rows, f"{chart.name}: {kind} has no rows"
    return "\n".join(parts)
