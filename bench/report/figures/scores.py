"""Scores against true bytes, with the Pareto front; and how much of full's score is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, NullLocator

from bench.names import FULL
from bench.records.files.numbers import bytes_text
from bench.records.row import Row
from bench.report.columns import BUDGET, RETENTION, SCORE, TOLERANCE
from bench.report.figures.canvas import (
    FOREGROUND,
    HEIGHT,
    WIDTH,
    Figure,
    colour,
    drawing,
    few_ticks,
    legend,
    looks_of,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in true bytes and in score together, by rising bytes.

    Bytes that differ by less than :data:`~bench.report.columns.TOLERANCE` are equal: a worse score is not worth them.
    Rows that were not exercised or whose bytes are unknown do not count.
    """
    playing = [row for row in rows if row.kv_bytes_mean is not None and not row.not_exercised]
    playing.sort(key=lambda row: (_bytes(row), -_worth(row)))
    return [
        row
        for place, row in enumerate(playing)
        if not any(_bytes(other) <= _bytes(row) * (1 + TOLERANCE) and _worth(other) > _worth(row) for other in playing)
        and not any(_worth(other) == _worth(row) for other in playing[:place])
    ]


def _bytes(row: Row) -> float:
    return row.kv_bytes_mean or 0.0


def _worth(row: Row) -> float:
    return row.score if row.higher_is_better else -row.score


def score_figure(name: str, rows: Sequence[Row], beside: Sequence[Row] = ()) -> Figure | None:
    """Score against true KV bytes with the Pareto front; None where fewer than two rows can be placed.

    Args:
        rows: of one model, task and metric.
        beside: those of the same task with its questions asked at another place: a panel of their own.
    """
    panels = [panel for panel in map(_placed, (rows, beside)) if len(panel) > 1]
    if not panels:
        return None
    higher = panels[0][0].higher_is_better
    tips: dict[str, str] = {}
    with drawing(WIDTH * (1.0 if len(panels) == 1 else 1.7), HEIGHT) as canvas:
        sharing = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        looks = looks_of((series(row), row.method) for panel in panels for row in panel)
        for number, (axes, shown) in enumerate(zip(sharing, panels, strict=True)):
            _draw(axes, shown, looks, f"tip-{number}", tips)
            if len(panels) > 1:
                axes.set_title(shown[0].task, fontsize=9)
        sharing[0].set_ylabel(f"{panels[0][0].metric}\n({'higher' if higher else 'lower'} is better)")
        legend(canvas, sharing[0])
    caption = (
        "Bars: 95 % intervals over documents. Dashed and ringed: the Pareto front of the scores as measured (no other "
        f"row has a better score and fewer bytes, up to {100 * TOLERANCE:g} % of them); it does not weigh the "
        "intervals. Rows that were not exercised are left out."
    )
    return Figure(name=name, caption=caption, canvas=canvas, tips=tips)


def _placed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.kv_bytes_mean and not row.not_exercised]


def _draw(axes: Axes, shown: Sequence[Row], looks: Mapping[str, Any], name: str, tips: dict[str, str]) -> None:
    """One panel; what its points say goes into ``tips``."""
    for number, label in enumerate(dict.fromkeys(map(series, shown))):
        mine = sorted((row for row in shown if series(row) == label), key=_bytes)
        look = looks[label]
        axes.plot([_bytes(row) / 1e6 for row in mine], [row.score for row in mine], linewidth=1, label=label, **look)
        for place, row in enumerate(mine):
            x = _bytes(row) / 1e6
            if row.score_low is not None and row.score_high is not None:
                axes.plot([x, x], [row.score_low, row.score_high], color=look["color"], linewidth=1, alpha=0.7)
            tip = f"{name}-{number}-{place}"
            axes.plot([x], [row.score], marker="o", markersize=14, alpha=0.0, gid=tip, color=look["color"])
            interval = SCORE.cell(row).replace("\n", " ")
            tips[tip] = f"{label} {BUDGET.cell(row)}: {row.metric} {interval}, {bytes_text(row.kv_bytes_mean)}"
    front = pareto_front(shown)
    line: dict[str, Any] = {"color": FOREGROUND, "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
    ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 0.9}
    steps = [_bytes(row) / 1e6 for row in front]
    axes.plot(steps, [row.score for row in front], drawstyle="steps-post", label="Pareto front", **line, **ring)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(few_ticks([_bytes(row) / 1e6 for row in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel("true KV bytes, MB (log)")
    axes.margins(x=0.08)


def retention_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """The share of full's score that each row keeps, with its interval; None where no row says it.

    Args:
        rows: of one model, task and metric.
    """
    shown = [row for row in rows if row.retention is not None and row.method != FULL and not row.not_exercised]
    if not shown:
        return None
    tips: dict[str, str] = {}
    with drawing(WIDTH, max(1.5, 0.9 + 0.27 * len(shown))) as canvas:
        axes = canvas.add_subplot()
        for place, row in enumerate(shown):
            kept = 100 * (row.retention or 0.0)
            tip = f"tip-{place}"
            axes.barh(place, kept, color=colour(row.method), height=0.7, gid=tip)
            tips[tip] = f"{series(row)} {BUDGET.cell(row)}: {RETENTION.cell(row)}"
            if row.retention_low is not None and row.retention_high is not None:
                ends = [100 * row.retention_low, 100 * row.retention_high]
                axes.plot(ends, [place, place], color=FOREGROUND, linewidth=1.2, marker="|")
        axes.axvline(100, color=FOREGROUND, linewidth=0.6, linestyle=(0, (2, 2)))
        axes.set_xlabel("% of full's score")
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(shown)), [" ".join(filter(None, (series(row), BUDGET.cell(row)))) for row in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
    caption = "Score over that of full on the same documents; lines: 95 % intervals of each row alone."
    return Figure(name=name, caption=caption, canvas=canvas, tips=tips)
