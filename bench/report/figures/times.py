"""Where time goes: per token, over a document's parts, over context lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from matplotlib.ticker import MaxNLocator

from bench.judge.speed import SpeedRow
from bench.names import FULL
from bench.records.row import Row
from bench.records.sample import Measured
from bench.report.columns import BUDGET
from bench.report.figures.canvas import (
    FOREGROUND,
    HEIGHT,
    SERIES,
    WIDTH,
    Figure,
    drawing,
    legend,
    looks_of,
    series,
)


def time_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """Milliseconds per output token, and seconds of compression; None without such times.

    Args:
        rows: of one model and task, one per cell.
    """
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("ms per output token", lambda row: row.tpot_ms),
        ("compression, s", lambda row: row.compress_s),
    ]
    panels = [panel for panel in panels if any(panel[1](row) is not None for row in rows)]
    if not panels or len(rows) < 2:
        return None
    labels = [" ".join(filter(None, (series(row), BUDGET.cell(row)))) for row in rows]
    with drawing(WIDTH, 1.0 + 0.27 * len(rows)) as canvas:
        sharing = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        colours = looks_of(list(dict.fromkeys(series(row) for row in rows if row.method != FULL)))
        for axes, (title, value) in zip(sharing, panels, strict=True):
            for place, row in enumerate(rows):
                colour = colours.get(series(row), {"color": FOREGROUND})["color"]
                if (length := value(row)) is not None:
                    axes.barh(place, length, color=colour, height=0.7)
            axes.set_xlabel(title)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(axis="y", length=0)
        sharing[0].set_yticks(range(len(rows)), labels)
        sharing[0].set_ylim(len(rows) - 0.4, -0.6)
    caption = (
        "Left: time of every later output token. Right: median time of compression after the prefill. Times are of the "
        "machine in the record; rows of one run share each prefill."
        if len(panels) == 2
        else "Times are of the machine in the record."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def share_figure(name: str, rows: Sequence[Row], samples: Iterable[Measured]) -> Figure | None:
    """Where the time of a document goes, and the share of the full cache's bytes that is held; None without times.

    Args:
        rows: of one model and task, one per cell.
        samples: those of the same model and task, for the times of what was read or generated.
    """
    seconds: dict[str, list[float]] = {}
    for sample in samples:
        seconds.setdefault(sample.cell, []).append(sample.decode_s)
    shown = [row for row in rows if row.prefill_s is not None and row.cell in seconds]
    if len(shown) < 2:
        return None
    parts = {
        "prefill": [row.prefill_s or 0.0 for row in shown],
        "compression": [row.compress_s or 0.0 for row in shown],
        "decoding or reading": [fmean(seconds[row.cell]) for row in shown],
    }
    totals = [sum(times) for times in zip(*parts.values(), strict=True)]
    labels = [" ".join(filter(None, (series(row), BUDGET.cell(row)))) for row in shown]
    places = range(len(shown))
    with drawing(WIDTH, 1.5 + 0.27 * len(shown)) as canvas:
        time, memory = canvas.subplots(1, 2, sharey=True)
        left = [0.0] * len(shown)
        for (part, times), colour in zip(parts.items(), (SERIES[0], SERIES[3], SERIES[2]), strict=True):
            widths = [100 * value / total if total else 0.0 for value, total in zip(times, totals, strict=True)]
            time.barh(places, widths, left=left, color=colour, height=0.7, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        memory.barh(places, [100 * (row.kv_share or 0.0) for row in shown], color=SERIES[4], height=0.7)
        for axes, title in ((time, "% of the time"), (memory, "% of full's KV bytes")):
            axes.set_xlabel(title)
            axes.set_xlim(0, 100 * max(1.0, *(row.kv_share or 0.0 for row in shown)) if axes is memory else 100)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(axis="y", length=0)
        time.set_yticks(places, labels)
        time.set_ylim(len(shown) - 0.4, -0.6)
        legend(canvas, time)
    caption = (
        "Left: shares of a document's time, means or medians over documents; rows of one run share each prefill. "
        "Right: true bytes of all that the cache holds, as a share of the full cache's keys and values."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def speed_figure(name: str, rows: Sequence[SpeedRow]) -> Figure:
    """Milliseconds per output token and tokens per second against context length.

    Args:
        rows: those of :func:`bench.judge.speed.summarize`, of one model and machine; the smallest batch of each context
            is drawn.
    """
    least = {
        length: min(row.batch_size for row in rows if row.context_length == length)
        for length in {row.context_length for row in rows}
    }
    rows = [row for row in rows if row.batch_size == least[row.context_length]]
    labels = list(dict.fromkeys(speed_series(row) for row in rows))
    looks = looks_of([label for label in labels if label != FULL])
    panels: tuple[tuple[str, Callable[[SpeedRow], float]], ...] = (
        ("ms per output token", lambda row: row.tpot_ms),
        ("output tokens per s", lambda row: row.decode_tokens_per_s),
    )
    lengths = sorted({row.context_length for row in rows})
    with drawing(WIDTH, HEIGHT) as canvas:
        for axes, (title, value) in zip(canvas.subplots(1, 2), panels, strict=True):
            for label in labels:
                mine = sorted((row.context_length, value(row)) for row in rows if speed_series(row) == label)
                look = looks.get(label, {"color": FOREGROUND, "marker": "*", "markersize": 9})
                axes.plot(*zip(*mine, strict=True), linewidth=1, label=label, **look)
            axes.set_xlabel("context, tokens")
            axes.set_ylabel(title)
            axes.set_ylim(bottom=0)
            axes.set_xticks(lengths if len(lengths) < 4 else [lengths[0], lengths[len(lengths) // 2], lengths[-1]])
            axes.margins(x=0.15)
        legend(canvas, axes)
    batches = " and ".join(map(str, sorted(set(least.values()))))
    caption = (
        f"Medians of arkv-bench speed, batch size {batches}; prompt tokens are never counted. ceiling: a stock cache "
        "that holds only C tokens."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def speed_series(row: SpeedRow) -> str:
    """What a cell of arkv-bench speed is labelled with."""
    size = row.budget if row.cache_size is None else f"C={row.cache_size}"
    return " ".join(filter(None, (row.method, row.quant_format, size)))
