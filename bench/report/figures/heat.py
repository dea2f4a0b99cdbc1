"""Heat maps of scores: what a method loses by the depth of a needle, the length of a prompt, or the task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from bench.names import FULL
from bench.records.row import Row
from bench.records.sample import Sample
from bench.report.columns import BUDGET
from bench.report.figures.canvas import WIDTH, Figure, drawing, series

FACTS = ("depth", "length")
"""What ``info`` of a document may say that a map is drawn over: downwards, and to the right."""
MOST_VALUES = 24
"""Of more, as of texts that are of any length, each is of a document or two: no means could be drawn."""
COLOURS, LEVELS = "viridis", 32
"""Told apart by most eyes, on paper too, and on dark and light grounds; few enough that the scale is no picture, which
the page would refuse to load."""
ACROSS = 4
"""Panels side by side."""
SAID = {"depth": "depth, share of the prompt before it", "length": "tokens of the prompt"}

Place = tuple[Any, Any]
"""What stands downwards and to the right."""


def fact_figures(name: str, rows: Sequence[Row], samples: Iterable[Sample]) -> list[Figure]:
    """A map over the facts that the documents differ in: a panel for each cell over depth and length, a row for each
    cell over one of them alone; none where nothing differs.

    Args:
        rows: of one model, task and metric, one per cell.
        samples: those of the same model and task.
    """
    shown = {row.cell: row for row in rows if not row.not_exercised}
    found: dict[str, list[tuple[dict[str, float], float]]] = {}
    for sample in samples:
        score = sample.scores.get(rows[0].metric)
        facts = {fact: float(value) for fact in FACTS if isinstance(value := sample.info.get(fact), int | float)}
        if sample.cell in shown and score is not None:
            found.setdefault(sample.cell, []).append((facts, score))
    values = {fact: {facts[fact] for mine in found.values() for facts, _ in mine if fact in facts} for fact in FACTS}
    differing = [fact for fact in FACTS if 1 < len(values[fact]) <= MOST_VALUES]
    if not differing:
        return []
    means: dict[str, dict[Place, list[float]]] = {}
    for cell, mine in found.items():
        for facts, score in mine:
            if all(fact in facts for fact in differing):
                place = tuple(facts[fact] for fact in differing)
                means.setdefault(cell, {}).setdefault((place[0], place[-1]), []).append(score)
    counts = sorted({len(scores) for mine in means.values() for scores in mine.values()})
    many = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    order = [row for cell, row in shown.items() if cell in means]
    over = f"{many} document{'' if many == '1' else 's'} of each {' and '.join(differing)}"
    caption = f"Mean {rows[0].metric} over {over}; report --by {differing[0]} has intervals."
    if len(differing) == 2:
        panels = {_label(row): {place: fmean(found) for place, found in means[row.cell].items()} for row in order}
        return [_figure(f"{name}-{'-'.join(differing)}", rows[0], panels, [SAID[fact] for fact in differing], caption)]
    single = {(_label(row), place[1]): fmean(scores) for row in order for place, scores in means[row.cell].items()}
    return [_figure(f"{name}-{differing[0]}", rows[0], {"": single}, ["", SAID[differing[0]]], caption)]


def task_figure(name: str, rows: Sequence[Row], samples: Iterable[Sample]) -> Figure | None:
    """The tasks of a group, each by its own first metric: a panel for each cell over task and length, or one over task
    and cell where prompts have no few lengths; None of fewer than two tasks.

    Args:
        rows: of one model, group and metric, one per cell.
        samples: those of the tasks of the group.
    """
    shown = {row.cell: row for row in rows if not row.not_exercised}
    found: dict[str, dict[Place, list[float]]] = {}
    for sample in samples:
        if sample.cell in shown and sample.score is not None:
            place = (sample.task, sample.info.get("length"))
            found.setdefault(sample.cell, {}).setdefault(place, []).append(sample.score)
    known = {length for mine in found.values() for _, length in mine}
    if len({task for mine in found.values() for task, _ in mine}) < 2:
        return None
    order = [row for cell, row in shown.items() if cell in found]
    caption = "Means over the documents of each task by its own first metric, on one scale."
    if 1 < len(known) <= MOST_VALUES and all(isinstance(length, int | float) for length in known):
        panels = {_label(row): {place: fmean(scores) for place, scores in found[row.cell].items()} for row in order}
        return _figure(f"{name}-tasks", rows[0], panels, ["", SAID["length"]], caption)
    merged: dict[Place, list[float]] = {}
    for row in order:
        for (task, _), scores in found[row.cell].items():
            merged.setdefault((task, _label(row)), []).extend(scores)
    single = {place: fmean(scores) for place, scores in merged.items()}
    return _figure(f"{name}-tasks", rows[0], {"": single}, ["", ""], caption)


def _label(row: Row) -> str:
    return " ".join(filter(None, (series(row), "" if row.method == FULL else BUDGET.cell(row))))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _figure(
    name: str, row: Row, panels: Mapping[str, Mapping[Place, float]], said: Sequence[str], caption: str
) -> Figure:
    """Panels on one scale, which is the metric's own where that has two ends.

    Args:
        panels: scores by place, by title.
        said: what stands downwards, and to the right.
    """
    down = _sorted(place[0] for panel in panels.values() for place in panel)
    right = _sorted(place[1] for panel in panels.values() for place in panel)
    scores = [score for panel in panels.values() for score in panel.values()]
    low = min(scores) if row.metric_low is None or row.metric_high is None else row.metric_low
    high = max(scores) if row.metric_low is None or row.metric_high is None else row.metric_high
    across = min(ACROSS, len(panels))
    lines = math.ceil(len(panels) / across)
    scale, colours = Normalize(low, high), matplotlib.colormaps[COLOURS].resampled(LEVELS)
    tips: dict[str, str] = {}
    turned = any(isinstance(value, str) for value in right)
    each = 0.24 * len(down) + (1.6 if turned else 0.7)
    with drawing(WIDTH, max(1.8, 0.5 + lines * each)) as canvas:
        grid = canvas.subplots(lines, across, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for number, (axes, (title, panel)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            axes.set_xticks([place + 0.5 for place in range(len(right))], map(_text, right), fontsize=7)
            axes.set_yticks([place + 0.5 for place in range(len(down))], map(_text, down), fontsize=7)
            axes.tick_params(length=0, axis="both")
            if turned or len(right) > 5:
                axes.tick_params(axis="x", rotation=60)
            axes.set_title(title, fontsize=8)
            for (y, x), score in panel.items():
                left, top = right.index(x), down.index(y)
                tip = f"tip-{number}-{left}-{top}"
                xs, ys = [left, left + 1, left + 1, left], [top, top, top + 1, top + 1]
                axes.fill(xs, ys, color=colours(scale(score)), linewidth=0, gid=tip, clip_on=False)
                tips[tip] = f"{', '.join(filter(None, (title, _text(y), _text(x))))}: {row.metric} {score:.3g}"
        # Empty where no document is of that place.
        grid.flat[0].set_xlim(0, len(right))
        grid.flat[0].set_ylim(len(down), 0)
        if said[1]:
            canvas.supxlabel(said[1], fontsize=8)
        if said[0]:
            canvas.supylabel(said[0], fontsize=8)
        canvas.colorbar(ScalarMappable(scale, colours), ax=grid, aspect=30, pad=0.02)
    return Figure(name=name, caption=caption, canvas=canvas, tips=tips)


def _sorted(values: Iterable[Any]) -> list[Any]:
    """Numbers by size, names as they come."""
    unique = list(dict.fromkeys(values))
    return unique if any(isinstance(value, str) for value in unique) else sorted(unique)
