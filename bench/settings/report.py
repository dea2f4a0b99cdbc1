"""Settings of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bench.settings.fields import Settings, setting

TABLES, FILES = "What is shown", "Files that are written"


class ReportConfig(Settings):
    """Everything that ``arkv-bench report`` can be told."""

    runs: tuple[Path, ...] = setting(
        (),
        "Run folders.",
        "Arguments",
        "nothing",
        unset="the newest under runs",
        argument=True,
        repeated=True,
        may_be_empty=True,
        shown_as="RUN",
    )
    format: Literal["terminal", "markdown", "csv"] = setting("terminal", "How tables are written.", TABLES, "nothing")
    details: bool = setting(
        False,
        "In the terminal every table: all metrics, p-values, bytes, states and notes.",
        TABLES,
        "nothing",
        unset="",
        switch=True,
    )
    by: str | None = setting(
        None,
        "Rows for each value of what documents say of themselves, such as length or depth.",
        TABLES,
        "nothing",
        shown_as="FACT",
    )
    against: Path | None = setting(
        None, "A CSV of published figures: show the runs beside them instead.", TABLES, "nothing", shown_as="FILE"
    )
    output: Path | None = setting(
        None,
        "Write the tables to this file instead of the terminal.",
        FILES,
        "nothing",
        short="-o",
        shown_as="FILE",
    )
    html: Path | None = setting(
        None, "Write one page with tables, figures and every answer.", FILES, "nothing", shown_as="FILE"
    )
    latex: Path | None = setting(None, "Write the tables for a paper (booktabs).", FILES, "nothing", shown_as="FILE")
    figures: Path | None = setting(None, "Write the figures as SVG, PNG and PDF.", FILES, "nothing", shown_as="DIR")
