"""The figures of a report: for the page as SVG that follows its colours, and as files for a paper."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bench.engine.inspect import StatesMap
from bench.errors import UserError
from bench.judge.comparison import not_exercised
from bench.names import FULL
from bench.report.tables import BUDGET, Row
from bench.runs.curve import curve_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOREGROUND = "#16191d"
SERIES = ("#0059b3", "#a84300", "#00704a", "#a1007f", "#6544b8", "#5a6300", "#a3262a", "#00707c")
"""Colours on white, told apart by most eyes; the page has a brighter set of its own on black."""
MARKERS = "osD^vPX"
FORMATS = ("svg", "png", "pdf")
WIDTH, HEIGHT = 5.0, 3.9
"""Inches. Small, so that 72 units per inch are about the pixels of a phone and letters keep their size."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names come from files
    "text.color": FOREGROUND,
    "axes.edgecolor": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "arkv-bench",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing that can be written in several formats."""

    name: str
    """Of its files, without an ending."""
    caption: str
    canvas: Canvas

    def inline_svg(self) -> str:
        """An ``<svg>`` element for a page: text and axes in the page's text colour, series in its ``--series-N``."""
        text = self._bytes("svg").decode()
        text = text[text.index("<svg") :]
        # Names of XML namespaces mean nothing within HTML.
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        # Several drawings on one page must not share ids.
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        # A hundredth of a point is less than anyone sees, and the page is half as large.
        text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
        text = text.replace(FOREGROUND, "currentColor")
        for number, colour in enumerate(SERIES, start=1):
            text = text.replace(colour, f"var(--series-{number})")
        return text.replace("<svg", '<svg aria-hidden="true"', 1)

    def save(self, folder: Path) -> list[Path]:
        """Write it in every one of :data:`FORMATS`.

        Raises:
            UserError: the folder cannot be written to.
        """
        paths = [folder / f"{self.name}.{ending}" for ending in FORMATS]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, ending in zip(paths, FORMATS, strict=True):
                path.write_bytes(self._bytes(ending))
        except OSError as error:
            raise UserError(f"{folder}: cannot write there ({error.strerror})") from None
        return paths

    def _bytes(self, ending: str) -> bytes:
        buffer = io.BytesIO()
        # No date and no maker: equal figures are equal files.
        nothing = {"svg": ("Creator", "Date", "Format", "Type"), "pdf": ("Creator", "Producer", "CreationDate")}
        metadata = dict.fromkeys(nothing.get(ending, ("Software",)))
        with matplotlib.rc_context(STYLE):
            self.canvas.savefig(buffer, format=ending, transparent=ending == "svg", dpi=200, metadata=metadata)
        return buffer.getvalue()


@contextmanager
def _drawing(width: float, height: float) -> Iterator[Canvas]:
    with matplotlib.rc_context(STYLE):
        yield Canvas(figsize=(width, height), layout="constrained")


def file_name(*parts: str) -> str:
    """A name that is one on every system, and an id in HTML."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.") or "x" for part in parts)[:100]


def series(row: Row) -> str:
    """What a row's points are labelled with: rows that differ in nothing but the budget are one series."""
    return " ".join(filter(None, (row["method"], row["quant_format"], row.get("run"))))


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in true bytes and in score together, by rising bytes.

    Rows that were not exercised or whose bytes are unknown do not count.
    """
    playing = [row for row in rows if row["kv_bytes_mean"] is not None and not not_exercised(row)]
    front: list[Row] = []
    for row in sorted(playing, key=lambda row: (row["kv_bytes_mean"], -_worth(row))):
        if not front or _worth(row) > _worth(front[-1]):
            front.append(row)
    return front


def _worth(row: Row) -> float:
    return float(row["score"]) if row["higher_is_better"] else -float(row["score"])


def _looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each series: no two share both among the first 56."""
    return {
        label: {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)]}
        for place, label in enumerate(labels)
    }


def _legend(canvas: Canvas, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) <= 16 else 2 if max(map(len, labels)) <= 26 else 1
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.2)


def score_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """Score against true KV bytes with the Pareto front; None where fewer than two rows can be placed.

    Args:
        rows: of one model, task and metric.
    """
    shown = [row for row in rows if row["kv_bytes_mean"] and not not_exercised(row)]
    if len(shown) < 2:
        return None
    metric, higher = shown[0]["metric"], shown[0]["higher_is_better"]
    with _drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        looks = _looks(list(dict.fromkeys(series(row) for row in shown if row["method"] != FULL)))
        for label in dict.fromkeys(map(series, shown)):
            mine = sorted((row for row in shown if series(row) == label), key=lambda row: row["kv_bytes_mean"])
            look = looks.get(label, {"color": FOREGROUND, "marker": "*", "markersize": 11})
            x, y = [row["kv_bytes_mean"] / 1e6 for row in mine], [row["score"] for row in mine]
            axes.plot(x, y, linewidth=1, alpha=0.95, label=label, **look)
            sure = [row for row in mine if row["score_low"] is not None and row["score_high"] is not None]
            for row in sure:
                place = [row["kv_bytes_mean"] / 1e6] * 2
                axes.plot(place, [row["score_low"], row["score_high"]], color=look["color"], linewidth=1, alpha=0.45)
        front = pareto_front(shown)
        steps = [row["kv_bytes_mean"] / 1e6 for row in front]
        line: dict[str, Any] = {"color": FOREGROUND, "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
        ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 0.9}
        axes.plot(steps, [row["score"] for row in front], drawstyle="steps-post", label="Pareto front", **line, **ring)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(_few(steps + [row["kv_bytes_mean"] / 1e6 for row in shown]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.set_xlabel("true KV bytes, MB (log)")
        axes.set_ylabel(f"{metric} ({'higher' if higher else 'lower'} is better)")
        axes.margins(x=0.08)
        _legend(canvas, axes)
    caption = (
        "Bars: 95 % intervals over documents. Dashed and ringed: the Pareto front of the scores as measured (no other "
        "row has fewer bytes and a better score); it does not weigh the intervals. Rows that were not exercised are "
        "left out."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def _few(values: Sequence[float]) -> Any:
    """Ticks on a logarithmic axis that have room: 1, 2, 5 within a few decades, else powers of ten."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0) if max(values) / min(values) < 300 else (1.0,))


def time_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """Milliseconds per output token, and seconds of compression; None without such times.

    Args:
        rows: of one model and task, one per cell.
    """
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("ms per output token", lambda row: row["tpot_ms"]),
        ("compression, s", lambda row: row["compress_s"]),
    ]
    panels = [panel for panel in panels if any(panel[1](row) is not None for row in rows)]
    if not panels or len(rows) < 2:
        return None
    labels = [" ".join(filter(None, (series(row), BUDGET.cell(row)))) for row in rows]
    with _drawing(WIDTH, 1.0 + 0.27 * len(rows)) as canvas:
        sharing = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        colours = _looks(list(dict.fromkeys(series(row) for row in rows if row["method"] != FULL)))
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


def curve_figure(name: str, rows: Sequence[Row], samples: Sequence[Mapping[str, Any]]) -> Figure | None:
    """KL divergence from the full cache over the position behind the prompt; None where no sample compares any.

    Args:
        rows: of one model and task, one per cell.
        samples: those of the same model and task.
    """
    by_cell = {row["cell"]: row for row in rows if row["method"] != FULL and not not_exercised(row)}
    curves: dict[str, list[dict[str, Any]]] = {}
    for point in curve_rows(sample for sample in samples if sample["cell"] in by_cell):
        curves.setdefault(point["cell"], []).append(point)
    # On a logarithmic axis nothing can be shown of a divergence of 0.
    curves = {cell: points for cell, points in curves.items() if len(points) > 1 and any(p["kl"] > 0 for p in points)}
    if not curves:
        return None
    with _drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        looks = itertools.cycle(zip(SERIES, itertools.cycle(("-", "--", "-.", ":")), strict=False))
        for (cell, points), (colour, style) in zip(curves.items(), looks, strict=False):
            row, shown = by_cell[cell], [point for point in points if point["kl"] > 0]
            label = " ".join(filter(None, (series(row), BUDGET.cell(row))))
            place = [point["position"] for point in shown]
            axes.plot(place, [p["kl"] for p in shown], color=colour, linestyle=style, linewidth=1.2, label=label)
            axes.plot(place, [p["kl_p95"] for p in shown], color=colour, linestyle=style, linewidth=0.8, alpha=0.35)
        axes.set_yscale("log")
        values = [point[name] for points in curves.values() for point in points for name in ("kl", "kl_p95")]
        axes.yaxis.set_major_locator(_few([value for value in values if value > 0]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("tokens read behind the prompt")
        axes.set_ylabel("KL to full, nats (log)")
        _legend(canvas, axes)
    count = max(point["n"] for points in curves.values() for point in points)
    caption = f"Mean over {count} prompts; faint: their 95th percentile, which of fewer than 20 is the largest."
    return Figure(name=name, caption=caption, canvas=canvas)


def layer_means(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean OQ ratio of each layer over documents, by cell; cells without ratios are left out."""
    ratios: dict[str, list[list[float]]] = {}
    for sample in samples:
        if sample["oq_ratios"]:
            ratios.setdefault(sample["cell"], []).append(sample["oq_ratios"])
    return {cell: [fmean(layer) for layer in zip(*found, strict=True)] for cell, found in ratios.items()}


def oq_figure(name: str, rows: Sequence[Row], samples: Sequence[Mapping[str, Any]]) -> Figure | None:
    """OQ ratio of each layer; None where no sample holds any.

    Args:
        rows: of one model and task, one per cell.
        samples: those of the same model and task.
    """
    by_cell = {row["cell"]: row for row in rows}
    lines: dict[tuple[float, ...], list[Row]] = {}
    for cell, means in layer_means(samples).items():
        if cell in by_cell:
            lines.setdefault(tuple(means), []).append(by_cell[cell])
    if not lines:
        return None
    with _drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        looks = itertools.cycle(zip(SERIES, itertools.cycle(("-", "--", "-.", ":")), strict=False))
        for (ratios, mine), (colour, style) in zip(lines.items(), looks, strict=False):
            budgets = ", ".join(BUDGET.cell(row) for row in mine)
            label = f"{' / '.join(dict.fromkeys(map(series, mine)))} at {budgets}"
            axes.plot(range(len(ratios)), ratios, color=colour, linestyle=style, marker=".", linewidth=1.2, label=label)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("OQ ratio")
        _legend(canvas, axes)
    caption = (
        "A layer's OQ score over the largest of all layers: the higher, the more of its budget stays Original. "
        "Means over documents; cells with the same ratios share a line."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def share_figure(name: str, rows: Sequence[Row], samples: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Where the time of a document goes, and the share of the full cache's bytes that is held; None without times.

    Args:
        rows: of one model and task, one per cell.
        samples: those of the same model and task, for the times of what was read or generated.
    """
    seconds: dict[str, list[float]] = {}
    for sample in samples:
        if sample.get("decode_s") is not None:
            seconds.setdefault(sample["cell"], []).append(sample["decode_s"])
    shown = [row for row in rows if row["prefill_s"] is not None and row["cell"] in seconds]
    if len(shown) < 2:
        return None
    parts = {
        "prefill": [row["prefill_s"] for row in shown],
        "compression": [row["compress_s"] or 0.0 for row in shown],
        "decoding or reading": [fmean(seconds[row["cell"]]) for row in shown],
    }
    totals = [sum(times) for times in zip(*parts.values(), strict=True)]
    labels = [" ".join(filter(None, (series(row), BUDGET.cell(row)))) for row in shown]
    places = range(len(shown))
    with _drawing(WIDTH, 1.5 + 0.27 * len(shown)) as canvas:
        time, memory = canvas.subplots(1, 2, sharey=True)
        left = [0.0] * len(shown)
        for (part, times), colour in zip(parts.items(), (SERIES[0], SERIES[3], SERIES[2]), strict=True):
            widths = [100 * value / total for value, total in zip(times, totals, strict=True)]
            time.barh(places, widths, left=left, color=colour, height=0.7, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        memory.barh(places, [100 * (row["kv_share"] or 0.0) for row in shown], color=SERIES[4], height=0.7)
        for axes, title in ((time, "% of the time"), (memory, "% of full's KV bytes")):
            axes.set_xlabel(title)
            axes.set_xlim(0, 100 * max(1.0, *(row["kv_share"] or 0.0 for row in shown)) if axes is memory else 100)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(axis="y", length=0)
        time.set_yticks(places, labels)
        time.set_ylim(len(shown) - 0.4, -0.6)
        _legend(canvas, time)
    caption = (
        "Left: shares of a document's time, means or medians over documents; rows of one run share each prefill. "
        "Right: true bytes of all that the cache holds, as a share of the full cache's keys and values."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def speed_figure(name: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds per output token and tokens per second against context length.

    Args:
        rows: those of :func:`bench.costs.speed.summarize`, of one model and machine.
    """
    labels = list(dict.fromkeys(speed_series(row) for row in rows))
    looks = _looks([label for label in labels if label != FULL])
    panels = (("ms per output token", "tpot_ms"), ("output tokens per s", "decode_tokens_per_s"))
    lengths = sorted({row["context_length"] for row in rows})
    with _drawing(WIDTH, HEIGHT) as canvas:
        for axes, (title, value) in zip(canvas.subplots(1, 2), panels, strict=True):
            for label in labels:
                mine = sorted((row["context_length"], row[value]) for row in rows if speed_series(row) == label)
                look = looks.get(label, {"color": FOREGROUND, "marker": "*", "markersize": 9})
                axes.plot(*zip(*mine, strict=True), linewidth=1, label=label, **look)
            axes.set_xlabel("context, tokens")
            axes.set_ylabel(title)
            axes.set_ylim(bottom=0)
            axes.set_xticks(lengths if len(lengths) < 4 else [lengths[0], lengths[len(lengths) // 2], lengths[-1]])
            axes.margins(x=0.15)
        _legend(canvas, axes)
    caption = (
        "Medians of arkv-bench speed; prompt tokens are never counted. ceiling: a stock cache that holds only C tokens."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def speed_series(row: Mapping[str, Any]) -> str:
    """What a cell of arkv-bench speed is labelled with."""
    size = "" if row["cache_size"] is None else f"C={row['cache_size']}"
    return " ".join(filter(None, (row["method"], row["quant_format"], size)))


def states_figure(name: str, states: StatesMap, title: str, *, window: int | None = None) -> Figure:
    """The states map of one prompt: a band per layer, filled by the share of heads that hold the tokens there.

    Args:
        title: what is shown, for the caption.
        window: the newest tokens, behind a thin line; None draws none.
    """
    count = len(states.layers)
    bins = len(states.original[0])
    edges = [states.tokens * place / bins for place in range(bins + 1)]

    def band(bottom: float, shares: Sequence[float]) -> tuple[list[float], list[float]]:
        """Outline of steps of height ``shares`` above ``bottom``; neighbours of one height are one step."""
        x, y = [edges[0]], [bottom]
        for place, share in enumerate(shares):
            if place and share == shares[place - 1]:
                x[-1] = edges[place + 1]
                continue
            x += [edges[place], edges[place + 1]]
            y += [bottom + 0.88 * share] * 2
        return [*x, edges[-1]], [*y, bottom]

    with _drawing(WIDTH, 1.2 + 0.13 * count) as canvas:
        axes = canvas.add_subplot()
        for place, (original, quantized) in enumerate(zip(states.original, states.quantized, strict=True)):
            bottom = count - 1 - place + 0.06
            tops = [share + more for share, more in zip(original, quantized, strict=True)]
            labels = ("Quantized", "Original") if place == 0 else (None, None)
            for shares, colour, label in zip((tops, original), (SERIES[1], SERIES[0]), labels, strict=True):
                if any(shares):
                    axes.fill(*band(bottom, shares), color=colour, linewidth=0, label=label)
        if window is not None:
            axes.axvline(states.tokens - window, color=FOREGROUND, linewidth=0.6, linestyle=(0, (2, 2)))
        axes.set_xlim(0, states.tokens)
        axes.set_ylim(0, count)
        shown = range(0, count, max(1, count // 10))
        axes.set_yticks([count - 0.5 - place for place in shown], [str(states.layers[place]) for place in shown])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("position in the prompt")
        axes.set_ylabel("layer")
        _legend(canvas, axes)
    caption = (
        f"States of {title}: in each layer's band the share of its {states.heads} KV heads that hold the tokens there "
        "as Original and as Quantized; what is blank has been evicted."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


def steps_figure(name: str, layers: Sequence[int], demoted: Sequence[Sequence[float]]) -> Figure | None:
    """Tokens that each layer demoted or evicted over decoding; None without steps.

    Args:
        demoted: for each of Quantized and Evicted, the total of each layer, mean over heads, [2][L].
    """
    if not any(map(any, demoted)):
        return None
    with _drawing(WIDTH, HEIGHT * 0.8) as canvas:
        axes = canvas.add_subplot()
        for label, values, colour, style in zip(
            ("became Quantized", "became Evicted"), demoted, (SERIES[1], FOREGROUND), ("-", "--"), strict=True
        ):
            axes.plot(layers, values, color=colour, linestyle=style, marker=".", linewidth=1.2, label=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("tokens per KV head")
        _legend(canvas, axes)
    caption = "Tokens that changed their state while decoding, over all steps, mean over the KV heads of a layer."
    return Figure(name=name, caption=caption, canvas=canvas)
