"""Drawing a chart as SVG, by matplotlib."""

from __future__ import annotations

import io
from typing import Any

from .rows import Chart, Rows

INK, MUTED, GRID = "#24292f", "#57606a", "#d8dee4"
COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df")
BAR = 0.27
"""Inches that a bar is high."""


def drawn(chart: Chart, rows: Rows, title: str) -> str:
    """The chart as SVG, the same whenever it is drawn."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    fonts: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.family": "sans-serif", "font.size": 10.5}
    with pyplot.rc_context(fonts):
        series = list(dict.fromkeys(name for values in rows.values() for name in values))
        height = 3.6 if chart.is_curve else 1.3 + BAR * (len(rows) * (len(series) + 0.8))
        figure, axes = pyplot.subplots(figsize=(7.6, height), layout="constrained")
        (_curve if chart.is_curve else _bars)(axes, rows, series, chart.is_ratio)
        axes.set_xlabel(chart.axis, color=MUTED)
        figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=11.5, fontweight="bold")
        axes.tick_params(colors=MUTED, length=0)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return out.getvalue()


def _bars(axes: Any, rows: Rows, series: list[str], is_ratio: bool) -> None:
    """Groups of bars, from the top down."""
    labels = list(rows)
    most = max(value for values in rows.values() for value in values.values())
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        there = [place for place, label in enumerate(labels) if name in rows[label]]
        values = [rows[labels[place]][name] for place in there]
        # In the middle of those of its group that are there.
        places = [
            place + (list(rows[labels[place]]).index(name) - (len(rows[labels[place]]) - 1) / 2) * width
            for place in there
        ]
        axes.barh(places, values, height=width * 0.9, color=COLOURS[number], label=name)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        for place, value in zip(places, values, strict=True):
            text = f"{value:.3g}x" if is_ratio else f"{value:.3g}"
            axes.annotate(
                text, (value, place), (4, 0), textcoords="offset points", va="center", color=INK, fontsize=9, bbox=paper
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.12)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    if is_ratio:
        axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=INK, loc="best")


def _curve(axes: Any, rows: Rows, series: list[str], is_ratio: bool) -> None:
    """One line, whose labels are numbers that double."""
    numbers, values = [int(label) for label in rows], [row[series[0]] for row in rows.values()]
    axes.plot(numbers, values, color=COLOURS[0], marker="o", linewidth=2)
    for number, value in zip(numbers, values, strict=True):
        axes.annotate(
            f"{value:.0f}", (number, value), (0, 7), textcoords="offset points", ha="center", color=INK, fontsize=9
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_ylim(0, max(values) * 1.18)
    axes.set_ylabel("generated tokens per second", color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
