"""Divergence over the position behind a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bench.judge.curve import curve_rows
from bench.names import FULL
from bench.records.curve import CurveRow
from bench.records.row import Row
from bench.records.sample import Sample
from bench.report.columns import BUDGET
from bench.report.figures.canvas import (
    HEIGHT,
    WIDTH,
    Figure,
    colour,
    drawing,
    few_ticks,
    legend,
    series,
)


def curve_figure(name: str, rows: Sequence[Row], samples: Iterable[Sample]) -> Figure | None:
    """KL divergence from the full cache over the position behind the prompt; None where no sample compares any.

    Args:
        rows: of one model and task, one per cell.
        samples: those of the same model and task.
    """
    by_cell = {row.cell: row for row in rows if row.method != FULL and not row.not_exercised}
    curves: dict[str, list[CurveRow]] = {}
    for point in curve_rows(sample for sample in samples if sample.cell in by_cell):
        curves.setdefault(point.cell, []).append(point)
    # On a logarithmic axis nothing can be shown of a divergence of 0.
    curves = {cell: points for cell, points in curves.items() if len(points) > 1 and any(p.kl > 0 for p in points)}
    if not curves:
        return None
    with drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        styles = itertools.cycle(("-", "--", "-.", ":"))
        for (cell, points), style in zip(curves.items(), styles, strict=False):
            row, shown = by_cell[cell], [point for point in points if point.kl > 0]
            ink = colour(row.method)
            label = " ".join(filter(None, (series(row), BUDGET.cell(row))))
            place = [point.position for point in shown]
            axes.plot(place, [p.kl for p in shown], color=ink, linestyle=style, linewidth=1.2, label=label)
            axes.plot(place, [p.kl_p95 for p in shown], color=ink, linestyle=style, linewidth=0.8, alpha=0.35)
        axes.set_yscale("log")
        values = [value for points in curves.values() for point in points for value in (point.kl, point.kl_p95)]
        axes.yaxis.set_major_locator(few_ticks([value for value in values if value > 0]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("tokens read behind the prompt")
        axes.set_ylabel("KL to full, nats (log)")
        legend(canvas, axes)
    count = max(point.n for points in curves.values() for point in points)
    caption = f"Mean over {count} prompts; faint: their 95th percentile, which of fewer than 20 is the largest."
    return Figure(name=name, caption=caption, canvas=canvas)
