"""Where time goes: per token, over a document's parts, over context lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bench.judge.speed import SpeedRow
from bench.names import with_format
from bench.records.files.numbers import bytes_text
from bench.records.row import Row
from bench.records.sample import Measured
from bench.report.columns import BUDGET
from bench.report.figures.canvas import (
    HEIGHT,
    SERIES,
    WIDTH,
    Figure,
    drawing,
    few_ticks,
    legend,
    looks_of,
    series,
)


def time_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """Tokens per second against true KV bytes; None where fewer than two rows have both.

    Args:
        rows: of one model and task, one per cell.
    """
    shown = [row for row in rows if row.tpot_ms and row.kv_bytes_mean]
    if len(shown) < 2:
        return None
    tips: dict[str, str] = {}
    with drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        looks = looks_of((series(row), row.method) for row in shown)
        for number, label in enumerate(looks):
            mine = sorted((row for row in shown if series(row) == label), key=lambda row: row.kv_bytes_mean or 0.0)
            points = [((row.kv_bytes_mean or 0.0) / 1e6, 1000 / (row.tpot_ms or 1.0)) for row in mine]
            axes.plot(*zip(*points, strict=True), linewidth=1, label=label, **looks[label])
            for place, (row, (x, y)) in enumerate(zip(mine, points, strict=True)):
                tip = f"tip-{number}-{place}"
                axes.plot([x], [y], marker="o", markersize=14, alpha=0.0, gid=tip, color=looks[label]["color"])
                compressed = "" if row.compress_s is None else f", compressed in {row.compress_s:.3g} s"
                said = f"{y:.3g} tokens per s, {bytes_text(row.kv_bytes_mean)}{compressed}"
                tips[tip] = f"{label} {BUDGET.cell(row)}: {said}"
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(few_ticks([(row.kv_bytes_mean or 0.0) / 1e6 for row in shown]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.margins(x=0.08, y=0.1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("true KV bytes, MB (log)")
        axes.set_ylabel("output tokens per s")
        legend(canvas, axes)
    caption = "By the time of every output token behind the first. Times are of the machine in the record."
    return Figure(name=name, caption=caption, canvas=canvas, tips=tips)


def share_figure(name: str, rows: Sequence[Row], samples: Iterable[Measured]) -> Figure | None:
    """Where the time of a document goes, and the share of the full cache's bytes that is held; None where fewer than
    two rows have both.

    Args:
        rows: of one model and task, one per cell.
        samples: those of the same model and task, for the times of what was read or generated.
    """
    seconds: dict[str, list[float]] = {}
    for sample in samples:
        seconds.setdefault(sample.cell, []).append(sample.decode_s)
    known = [
        (row, row.prefill_s, 100 * row.kv_share)
        for row in rows
        if row.prefill_s is not None and row.kv_share is not None and row.cell in seconds
    ]
    if len(known) < 2:
        return None
    shown, prefills, held = zip(*known, strict=True)
    parts = {
        "prefill": prefills,
        # None of a cache that nothing is compressed of.
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
        memory.barh(places, held, color=SERIES[4], height=0.7)
        for axes, title in ((time, "% of the time"), (memory, "% of full's KV bytes")):
            axes.set_xlabel(title)
            axes.set_xlim(0, max(100.0, *held) if axes is memory else 100)
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
    looks = looks_of((speed_series(row), row.method) for row in rows)
    panels: tuple[tuple[str, Callable[[SpeedRow], float]], ...] = (
        ("ms per output token", lambda row: row.tpot_ms),
        ("output tokens per s", lambda row: row.decode_tokens_per_s),
    )
    lengths = sorted({row.context_length for row in rows})
    with drawing(WIDTH, HEIGHT) as canvas:
        for axes, (title, value) in zip(canvas.subplots(1, 2), panels, strict=True):
            for label, look in looks.items():
                mine = sorted((row.context_length, value(row)) for row in rows if speed_series(row) == label)
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
    return " ".join(filter(None, (with_format(row.method, row.quant_format), size)))
