"""The pictures that README.md and docs/results.md show, drawn of the rows that their captions speak of: ``make docs``
writes them, a test compares what they say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.names import own_name
from bench.records.files.text import write_output
from bench.records.row import Row
from bench.report.figures.canvas import Figure
from bench.report.figures.scores import score_figure
from scripts.figures_in_docs import exam, results
from scripts.figures_in_docs.common import RESULTS, known

PICTURES: dict[Path, Callable[[], Sequence[Row]]] = {
    RESULTS / exam.EXAM / "score.png": exam.drawn,
    RESULTS / "demo" / "needle.png": results.drawn,
}
"""By file the rows that are drawn, all of one task."""
SAYS = "Description"
"""Of a PNG file: the text in it that says what was drawn."""


def write() -> None:
    """Draw all of them anew."""
    for path, rows in PICTURES.items():
        figure, said = drawing(rows())
        write_output(path, figure.encoded("png", {SAYS: said}))


def drawing(rows: Sequence[Row]) -> tuple[Figure, str]:
    """A picture, and what it shows: the task with its documents, and every point."""
    figure = known(score_figure("score", rows), "bytes or scores of a picture")
    ((task, n),) = {(own_name(row.task), row.n) for row in rows}
    return figure, "\n".join([f"{task}, {n} documents", *figure.tips.values()])
