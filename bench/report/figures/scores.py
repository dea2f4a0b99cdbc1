"""Scores against true bytes, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, NullLocator

from bench.names import FULL
from bench.records.row import Row
from bench.report.figures.canvas import (
    FOREGROUND,
    HEIGHT,
    WIDTH,
    Figure,
    drawing,
    few_ticks,
    legend,
    looks_of,
    series,
)


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in true bytes and in score together, by rising bytes.

    Rows that were not exercised or whose bytes are unknown do not count.
    """
    playing = [row for row in rows if row.kv_bytes_mean is not None and not row.not_exercised]
    front: list[Row] = []
    for row in sorted(playing, key=lambda row: (_bytes(row), -_worth(row))):
        if not front or _worth(row) > _worth(front[-1]):
            front.append(row)
    return front


def _bytes(row: Row) -> float:
    return row.kv_bytes_mean or 0.0


def _worth(row: Row) -> float:
    return row.score if row.higher_is_better else -row.score


def score_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """Score against true KV bytes with the Pareto front; None where fewer than two rows can be placed.

    Args:
        rows: of one model, task and metric.
    """
    shown = [row for row in rows if row.kv_bytes_mean and not row.not_exercised]
    if len(shown) < 2:
        return None
    metric, higher = shown[0].metric, shown[0].higher_is_better
    with drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        looks = looks_of(list(dict.fromkeys(series(row) for row in shown if row.method != FULL)))
        for label in dict.fromkeys(map(series, shown)):
            mine = sorted((row for row in shown if series(row) == label), key=_bytes)
            look = looks.get(label, {"color": FOREGROUND, "marker": "*", "markersize": 11})
            x, y = [_bytes(row) / 1e6 for row in mine], [row.score for row in mine]
            axes.plot(x, y, linewidth=1, alpha=0.95, label=label, **look)
            for row in mine:
                if row.score_low is not None and row.score_high is not None:
                    place = [_bytes(row) / 1e6] * 2
                    axes.plot(place, [row.score_low, row.score_high], color=look["color"], linewidth=1, alpha=0.45)
        front = pareto_front(shown)
        steps = [_bytes(row) / 1e6 for row in front]
        line: dict[str, Any] = {"color": FOREGROUND, "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
        ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 0.9}
        axes.plot(steps, [row.score for row in front], drawstyle="steps-post", label="Pareto front", **line, **ring)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(few_ticks(steps + [_bytes(row) / 1e6 for row in shown]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.set_xlabel("true KV bytes, MB (log)")
        axes.set_ylabel(f"{metric} ({'higher' if higher else 'lower'} is better)")
        axes.margins(x=0.08)
        legend(canvas, axes)
    caption = (
        "Bars: 95 % intervals over documents. Dashed and ringed: the Pareto front of the scores as measured (no other "
        "row has fewer bytes and a better score); it does not weigh the intervals. Rows that were not exercised are "
        "left out."
    )
    return Figure(name=name, caption=caption, canvas=canvas)
