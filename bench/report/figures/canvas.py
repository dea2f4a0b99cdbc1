"""What all figures share: colours and letters, labels of series, legends, and the formats they are written in."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from markupsafe import escape
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator

from bench.names import FULL, with_format
from bench.records.files.text import write_output
from bench.records.row import Row
from bench.report.looks import colour_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FOREGROUND = "#16191d"
SERIES = (
    *("#0059b3", "#a84300", "#00704a", "#a1007f", "#6544b8", "#5a6300", "#a3262a", "#00707c"),
    *("#6b4226", "#4a5568", "#2e7d00", "#1a237e"),
)
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
    tips: Mapping[str, str] = field(default_factory=dict)
    """What is said where the pointer rests, by the ``gid`` of what is drawn there."""

    def inline_svg(self) -> str:
        """An ``<svg>`` element for a page: text and axes in the page's text colour, series in its ``--series-N``."""
        text = self.encoded("svg").decode()
        text = text[text.index("<svg") :]
        # Names of XML namespaces mean nothing within HTML.
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        for place, said in self.tips.items():
            text = text.replace(f'<g id="{place}">', f"<g><title>{escape(said)}</title>", 1)
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
            UserError: a file cannot be written.
        """
        paths = [folder / f"{self.name}.{ending}" for ending in FORMATS]
        for path, ending in zip(paths, FORMATS, strict=True):
            write_output(path, self.encoded(ending))
        return paths

    def encoded(self, ending: str, said: Mapping[str, str] | None = None) -> bytes:
        """The drawing in one of :data:`FORMATS`; a PNG file has ``said`` in it, texts by their keywords."""
        buffer = io.BytesIO()
        # No date and no maker: equal figures are equal files.
        nothing = {"svg": ("Creator", "Date", "Format", "Type"), "pdf": ("Creator", "Producer", "CreationDate")}
        metadata = {**dict.fromkeys(nothing.get(ending, ("Software",))), **(said or {})}
        with matplotlib.rc_context(STYLE):
            self.canvas.savefig(buffer, format=ending, transparent=ending == "svg", dpi=200, metadata=metadata)
        return buffer.getvalue()


@contextmanager
def drawing(width: float, height: float) -> Iterator[Canvas]:
    """An empty drawing of so many inches, under the style of all of them."""
    with matplotlib.rc_context(STYLE):
        yield Canvas(figsize=(width, height), layout="constrained")


def file_name(*parts: str) -> str:
    """A name that is one on every system, and an id in HTML."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.") or "x" for part in parts)[:100]


def series(row: Row) -> str:
    """What a row's points are labelled with: rows that differ in nothing but the budget are one series."""
    return " ".join(filter(None, (with_format(row.method, row.quant_format), row.run)))


def colour(method: str) -> str:
    """The colour that a method has in every figure."""
    number = colour_of(method)
    return SERIES[number - 1] if number else FOREGROUND


def looks_of(methods: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Colour, which is the method's, and marker of each series. The full cache is a star.

    Args:
        methods: of each series, its label and its method.
    """
    looks: dict[str, dict[str, Any]] = {}
    for label, method in methods:
        marker = MARKERS[len(looks) % len(MARKERS)]
        shape = {"marker": "*", "markersize": 11} if method == FULL else {"marker": marker}
        looks.setdefault(label, {"color": colour(method), **shape})
    return looks


def legend(canvas: Canvas, axes: Axes) -> None:
    """Names of the series below the drawing, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) <= 16 else 2 if max(map(len, labels)) <= 26 else 1
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.2)


def few_ticks(values: Sequence[float]) -> Any:
    """Ticks on a logarithmic axis that have room: 1, 2, 5 within a few decades, else powers of ten."""
    return LogLocator(subs=(1.0, 2.0, 5.0) if max(values) / min(values) < 300 else (1.0,))
