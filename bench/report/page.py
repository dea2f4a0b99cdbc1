"""One self-contained HTML page about runs: the answer, tables, figures, every document, failures, the records."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bench.records.files.json_ import json_text
from bench.records.files.text import printable
from bench.records.finished import Run
from bench.records.shown import headline
from bench.records.unfinished import unfinished
from bench.report import averages
from bench.report.columns import LEGEND
from bench.report.figures.canvas import Figure, file_name
from bench.report.figures.layers import states_figure
from bench.report.paragraphs import problems_of
from bench.report.sections import DETAILED, FIGURED, pair_sections, run_sections, speed_sections
from bench.report.verdicts import HEADERS, answer, times_of
from bench.report.viewer import viewer_of

STYLES, SCRIPTS = ("page.css", "viewer.css"), ("page.js", "viewer.js", "live.js")
BESIDE = " 'self' file:"
"""Of a page that is a file, its neighbours are no part of 'self' in every browser."""
SERVED = " 'self'; connect-src 'self'"
MAPS = 6
"""States maps that are drawn: each takes some 60 kB."""


def _map_figures(runs: Sequence[Run]) -> tuple[list[Figure], int]:
    """States maps, those with Quantized tokens first, and how many are not drawn."""
    found = [(run, item) for run in runs for item in run.maps]
    found.sort(key=lambda pair: not any(map(any, pair[1].map.quantized)))
    figures = []
    for number, (run, item) in enumerate(found[:MAPS], start=1):
        what = f"{item.task}, document {item.document}, {item.model}: {item.label}"
        title = printable(f"{what} ({run.name})" if len(runs) > 1 else what)
        figures.append(states_figure(f"states-{number}-{file_name(item.cell)}", item.map, title))
    return figures, len(found) - len(figures)


@dataclass(frozen=True)
class Page:
    """The page and the figures on it."""

    html: str
    figures: list[Figure]


def render(template: str, title: str, sources: str = "", **values: Any) -> str:
    """A page of its own from one of the templates; every value passes through autoescape.

    Args:
        sources: what else its policy lets scripts be loaded from, and data.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The page's own files need no escaping.
    style = Markup("".join(_source(environment, name) for name in STYLES))
    script = Markup("".join(_source(environment, name) for name in SCRIPTS))
    return environment.get_template(template).render(
        title=title,
        sources=Markup(sources),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def build(runs: Sequence[Run], beside: Path | None = None, *, live: bool = False) -> Page:
    """The page of one or more runs.

    Args:
        live: it is served, and asks how the run goes.
        beside: the folder for samples that are too many for the page; without one all of them stand in it.

    Raises:
        UserError: a file there cannot be written.
    """
    sections, warnings = run_sections(runs)
    speed, reasons = speed_sections(runs)
    pairs = pair_sections(runs)
    maps, undrawn = _map_figures(runs)
    samples = viewer_of(runs, beside)
    figures = [*(figure for section in [*sections, *speed] for figure in section.figures), *maps]
    html = render(
        "page.html.j2",
        ", ".join(run.name for run in runs),
        sources=SERVED if live else "" if samples is None or samples.chunks else BESIDE,
        live=sum(len(run.samples) for run in runs) if live else None,
        runs=runs,
        answers={run.name: answer(run) for run in runs if run.is_run},
        answer_headers=HEADERS,
        unfinished={
            run.name: unfinished(run.path, run.of_run, len(run.samples)) for run in runs if run.is_run and run.record
        },
        warnings=[*warnings, *reasons],
        sections=[*sections, *pairs, *speed],
        maps=maps,
        undrawn=undrawn,
        unfigured=max(len(sections) - FIGURED, 0),
        undetailed=max(len(sections) - DETAILED, 0),
        averages=averages.run_averages(averages.together({run.name: run.rows for run in runs})),
        averages_legend=averages.LEGEND,
        drawn={figure.name: Markup(figure.inline_svg()) for figure in figures},
        problems={run.name: problems_of(run) for run in runs if run.is_run or problems_of(run)},
        records={run.name: json_text(run.record.model_dump(exclude_unset=True)).rstrip() for run in runs if run.record},
        left_out=sum(len(run.rows) - len(headline(run.rows)) for run in runs),
        legend=[*LEGEND, *filter(None, [times_of(runs)])],
        samples=samples and {"index": Markup(samples.index), "chunks": [Markup(text) for text in samples.chunks]},
        documents=samples.documents if samples else 0,
    )
    return Page(html=html, figures=figures)


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
