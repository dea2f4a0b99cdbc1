"""What differs from layer to layer: OQ ratios, states maps, tokens that changed their state."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from matplotlib.ticker import MaxNLocator

from bench.errors import UserError
from bench.records.row import Row
from bench.records.sample import REMEDY, Sample
from bench.records.states import StatesMap
from bench.report.columns import BUDGET
from bench.report.figures.canvas import (
    FOREGROUND,
    HEIGHT,
    SERIES,
    WIDTH,
    Figure,
    colour,
    drawing,
    legend,
    series,
)


def layer_means(samples: Iterable[Sample]) -> dict[str, list[float]]:
    """Mean OQ ratio of each layer over documents, by cell; cells without ratios are left out.

    Raises:
        UserError: two samples of a cell are of different numbers of layers.
    """
    sums: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    for sample in samples:
        if not sample.oq_ratios:
            continue
        mine = sums.setdefault(sample.cell, [0.0] * len(sample.oq_ratios))
        if len(mine) != len(sample.oq_ratios):
            found = f"{len(mine)} and {len(sample.oq_ratios)}"
            raise UserError(f"{sample.task}, {sample.cell}: samples have OQ ratios of {found} layers; {REMEDY}")
        for layer, ratio in enumerate(sample.oq_ratios):
            mine[layer] += ratio
        counts[sample.cell] += 1
    return {cell: [total / counts[cell] for total in mine] for cell, mine in sums.items()}


def oq_figure(name: str, rows: Sequence[Row], samples: Iterable[Sample]) -> Figure | None:
    """OQ ratio of each layer; None where no sample holds any.

    Args:
        rows: of one model and task, one per cell.
        samples: those of the same model and task.
    """
    by_cell = {row.cell: row for row in rows}
    lines: dict[tuple[float, ...], list[Row]] = {}
    for cell, means in layer_means(samples).items():
        if cell in by_cell:
            lines.setdefault(tuple(means), []).append(by_cell[cell])
    if not lines:
        return None
    with drawing(WIDTH, HEIGHT) as canvas:
        axes = canvas.add_subplot()
        styles = itertools.cycle(("-", "--", "-.", ":"))
        for (ratios, mine), style in zip(lines.items(), styles, strict=False):
            ink = colour(mine[0].method)
            budgets = ", ".join(BUDGET.cell(row) for row in mine)
            label = f"{' / '.join(dict.fromkeys(map(series, mine)))} at {budgets}"
            axes.plot(range(len(ratios)), ratios, color=ink, linestyle=style, marker=".", linewidth=1.2, label=label)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("OQ ratio")
        legend(canvas, axes)
    caption = (
        "A layer's OQ score over the largest of all layers: the higher, the more of its budget stays Original. "
        "Means over documents; cells with the same ratios share a line."
    )
    return Figure(name=name, caption=caption, canvas=canvas)


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

    with drawing(WIDTH, 1.2 + 0.13 * count) as canvas:
        axes = canvas.add_subplot()
        for place, (original, quantized) in enumerate(zip(states.original, states.quantized, strict=True)):
            bottom = count - 1 - place + 0.06
            tops = [share + more for share, more in zip(original, quantized, strict=True)]
            labels = ("Quantized", "Original") if place == 0 else (None, None)
            for shares, shade, label in zip((tops, original), (SERIES[1], SERIES[0]), labels, strict=True):
                if any(shares):
                    axes.fill(*band(bottom, shares), color=shade, linewidth=0, label=label)
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
        legend(canvas, axes)
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
    with drawing(WIDTH, HEIGHT * 0.8) as canvas:
        axes = canvas.add_subplot()
        for label, values, shade, style in zip(
            ("became Quantized", "became Evicted"), demoted, (SERIES[1], FOREGROUND), ("-", "--"), strict=True
        ):
            axes.plot(layers, values, color=shade, linestyle=style, marker=".", linewidth=1.2, label=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("tokens per KV head")
        legend(canvas, axes)
    caption = "Tokens that changed their state while decoding, over all steps, mean over the KV heads of a layer."
    return Figure(name=name, caption=caption, canvas=canvas)
