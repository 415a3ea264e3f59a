"""Steps as people look at them: a table, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..table import Table
from .step import PARTS, Step


def table(steps: Sequence[Step]) -> Table:
    """A row for each step; the headings of parts name the kernels of the last."""
    kernels = steps[-1].kernels if steps else {}
    parts = [f"{part} ({kernels[part]})" if part in kernels else part for part in PARTS]
    headings = ("step", "tokens/s", *parts, "memory", "peak", "loss", "gradient norm", "imbalance")
    return Table(headings, [_row(step) for step in steps])


def _row(step: Step) -> Sequence[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        str(step.number),
        number(step.tokens_per_second, ",.1f"),
        *(f"{step.parts[part] / step.seconds:.0%}" for part in PARTS),
        f"{step.memory / 1e9:,.2f} GB",
        step.peak_of_plan,
        number(step.loss, ".4f"),
        number(step.grad_norm, ".4g"),
        number(step.imbalance, ".2f"),
    )


def figure(steps: Sequence[Step]) -> Any:
    """Loss, throughput, memory (with the plan's peak) and the load of experts in the last step, as a figure."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "gptoss-opt[train]".') from error

    class Picture(Figure):
        # A notebook shows a plain figure only where pyplot was imported.
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    made = Picture(figsize=(10, 7), layout="constrained")
    axes: Any = made.subplots(2, 2)
    drawn: list[tuple[Any, str, list[tuple[int, float | None]]]] = [
        (axes[0, 0], "loss", [(step.number, step.loss) for step in steps]),
        (axes[0, 1], "tokens/s", [(step.number, step.tokens_per_second) for step in steps]),
        (axes[1, 0], "memory, GB", [(step.number, step.memory / 1e9) for step in steps]),
    ]
    for place, title, values in drawn:
        known = [(number, value) for number, value in values if value is not None]
        place.plot([number for number, _ in known], [value for _, value in known], marker=".", label="measured")
        place.set_title(title)
        place.set_xlabel("step")
    last = steps[-1] if steps else None
    if last is not None and last.planned is not None:
        axes[1, 0].axhline(last.planned / 1e9, linestyle="--", color="gray", label="peak of the plan")
        axes[1, 0].legend()
    for place, _, _ in drawn:
        place.margins(y=0.1)
        place.autoscale_view()
        bottom, top = place.get_ylim()
        if top > 0:
            place.set_ylim(min(0, bottom), 1.05 * top)
    if last is not None and last.load:
        shown = axes[1, 1].imshow([list(layer) for layer in last.load], aspect="auto")
        made.colorbar(shown, ax=axes[1, 1])
        for axis in (axes[1, 1].xaxis, axes[1, 1].yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 1].set_title("tokens of each expert in the last step")
    axes[1, 1].set_xlabel("expert")
    axes[1, 1].set_ylabel("layer")
    return made
