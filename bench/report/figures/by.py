"""Scores over what documents are: the length of a prompt, the depth of a needle."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from bench.names import FULL
from bench.records.row import Row
from bench.records.sample import Sample
from bench.report.columns import BUDGET
from bench.report.figures.canvas import FOREGROUND, HEIGHT, SERIES, WIDTH, Figure, drawing, legend, series

FACTS = ("length", "depth")
"""What ``info`` of a document may say that has a figure of its own."""

MOST_VALUES = 12
"""Of more, as of texts that are of any length, each is of a document or two: no means could be drawn."""

Scores = Mapping[str, Mapping[float, Sequence[float]]]
"""Of the documents of each value, by cell."""


def scores_by(rows: Sequence[Row], samples: Iterable[Sample]) -> dict[str, Scores]:
    """Scores by fact, cell and value, of the facts that have several values.

    Args:
        rows: of one model, task and metric, one per cell.
        samples: those of the same model and task.
    """
    metric = rows[0].metric
    cells = {row.cell for row in rows if not row.not_exercised}
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for sample in samples:
        score = sample.scores.get(metric)
        for fact in FACTS if sample.cell in cells and score is not None else ():
            value = sample.info.get(fact)
            if isinstance(value, int | float) and score is not None:
                found.setdefault(fact, {}).setdefault(sample.cell, {}).setdefault(float(value), []).append(score)
    counts = {fact: len({value for values in by_cell.values() for value in values}) for fact, by_cell in found.items()}
    return {fact: by_cell for fact, by_cell in found.items() if 1 < counts[fact] <= MOST_VALUES}


def by_figures(name: str, rows: Sequence[Row], samples: Iterable[Sample]) -> list[Figure]:
    """A figure for each fact that the documents differ in, with a line for each cell."""
    return [_figure(f"{name}-{fact}", rows, fact, scores) for fact, scores in scores_by(rows, samples).items()]


def _figure(name: str, rows: Sequence[Row], fact: str, scores: Scores) -> Figure:
    with drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        looks = itertools.cycle(zip(SERIES, itertools.cycle(("-", "--", "-.", ":")), strict=False))
        for row in rows:
            mine = scores.get(row.cell)
            if not mine:
                continue
            colour, style = (FOREGROUND, "-") if row.method == FULL else next(looks)
            label = " ".join(filter(None, (series(row), BUDGET.cell(row))))
            values = sorted(mine)
            means = [fmean(mine[value]) for value in values]
            axes.plot(
                values, means, color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.2, label=label
            )
        axes.set_xlabel("tokens of the prompt" if fact == "length" else "depth, share of the prompt before it")
        axes.set_ylabel(f"{rows[0].metric} ({'higher' if rows[0].higher_is_better else 'lower'} is better)")
        axes.margins(x=0.05)
        legend(canvas, axes)
    counts = sorted({len(found) for by_value in scores.values() for found in by_value.values()})
    many = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    caption = f"Means over {many} documents of each {fact}; report --by {fact} has their intervals."
    return Figure(name=name, caption=caption, canvas=canvas)
