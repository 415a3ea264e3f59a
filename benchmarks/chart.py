"""The picture of throughput against concurrency, from results/batching-zen-4.jsonl.

pip install matplotlib && python -m benchmarks.chart
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import RESULTS

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "throughput.svg"
INK, MUTED, OURS = "#24292f", "#6e7781", "#0969da"


def main() -> None:
    """Draw it."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    points = [json.loads(line) for line in (RESULTS / "batching-zen-4.jsonl").read_text().splitlines()]
    by_number = next(one for one in points if one["case"] == "tokens/s by max_num_sequences")["tokens/s"]
    numbers, rates = [int(number) for number in by_number], list(by_number.values())
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gptoss_opt", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    axes.plot(numbers, rates, color=OURS, marker="o", linewidth=2)
    for number, rate in zip(numbers, rates, strict=True):
        axes.annotate(f"{rate:.0f}", (number, rate), (0, 7), textcoords="offset points", ha="center", color=INK)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_ylim(0, max(rates) * 1.15)
    axes.set_xlabel("sequences at once (max_num_sequences)", color=MUTED)
    axes.set_ylabel("generated tokens per second", color=MUTED)
    axes.tick_params(colors=MUTED)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
