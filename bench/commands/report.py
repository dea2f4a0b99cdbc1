"""``arkv-bench report``: the tables of one or more runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    """How a table is written."""

    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    CSV = "csv"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...", show_default=False)],
    format: Annotated[Format, typer.Option(help="terminal, markdown or csv.")] = Format.TERMINAL,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this file instead of the terminal.", show_default=False),
    ] = None,
) -> None:
    """Print the comparison of each task: methods as rows, budgets grouped, the best of each budget in bold.

    [bold]arkv-bench report runs/demo[/bold]
    [bold]arkv-bench report runs/a runs/b --format markdown -o table.md[/bold]
    """
    from bench.records import write_atomic
    from bench.report.tables import print_comparison, read_results, to_csv, to_markdown

    tables = [read_results(path) for path in runs]
    if format is Format.TERMINAL and output is None:
        from rich.console import Console

        print_comparison(tables, Console())
        return
    text = to_csv(tables) if format is Format.CSV else to_markdown(tables)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(output, text)
        typer.echo(f"wrote {output}")
