"""``arkv-bench report``: the tables of one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bench.commands.output import named_or_newest, write
from bench.errors import UserError
from bench.settings.options import given, takes
from bench.settings.report import ReportConfig

if TYPE_CHECKING:
    from bench.records.row import Row
    from bench.report.between import Pair


@takes(ReportConfig)
def report(**typed: Any) -> None:
    """Print the answer, the best method of each budget and what it costs, then a short table of each task: methods as
    rows, budgets grouped, the best of each in bold.

    All metrics, p-values and notes come with --details.

    Of several runs every table says in a column which run a row is of, and each further run is compared with the first
    on the documents that both have answered, with everything that differs between the two.

    Tasks that were asked for through a group with a score of its own stand in the CSV format only.

    [bold]arkv-bench report[/bold]
    [bold]arkv-bench report runs/demo[/bold]
    [bold]arkv-bench report runs/demo --details[/bold]
    [bold]arkv-bench report runs/a runs/b --format markdown -o table.md[/bold]
    [bold]arkv-bench report runs/demo --by depth[/bold]
    [bold]arkv-bench report runs/a --against published.csv[/bold]
    [bold]arkv-bench report runs/a runs/b --html page.html --figures figures --latex table.tex[/bold]
    """
    config = ReportConfig(**given(ReportConfig, typed))
    against, html, latex, figures, output = config.against, config.html, config.latex, config.figures, config.output
    by = config.by
    if against is not None and (html is not None or figures is not None or latex is not None):
        message = "--against is a table of its own: leave it out, or leave out --html, --figures and --latex"
        raise UserError(message, 2)
    if by is not None and (against is not None or html is not None or figures is not None or latex is not None):
        raise UserError("--by is a table of its own: leave out --against, --html, --figures and --latex", 2)
    folders = named_or_newest(config.runs)
    if html is not None or figures is not None or latex is not None:
        if latex is not None:
            _write_latex(folders, latex)
        if html is not None or figures is not None:
            _write_page(folders, html, figures)
        if output is None:
            return
    from bench.records.files.markdown import in_markdown
    from bench.records.finished import Run, record_of
    from bench.records.row import read_results
    from bench.records.shown import run_names
    from bench.report import against as published
    from bench.report import averages
    from bench.report import between_written as changed
    from bench.report.terminal import print_runs
    from bench.report.verdicts import times_of
    from bench.report.writing import to_csv, to_markdown

    if by is not None:
        _print_by(folders, by, config)
        return
    so_far = _unfinished(folders)
    try:
        tables = [read_results(path) for path in folders]
    except UserError as error:
        raise UserError("; ".join([str(error), *so_far]), error.exit_code) from None
    shown, pairs_of_runs, reasons = _shown(folders)
    rows = [row for table in tables for row in table]
    by_run = dict(zip(run_names(folders), tables, strict=True))
    records = dict(zip(by_run, map(record_of, folders), strict=True))
    runs = [Run(name=name, rows=mine, record=records[name]) for name, mine in by_run.items()]
    pairs = published.pair(rows, published.read_published(against)) if against is not None else None
    if config.format == "terminal" and output is None:
        from rich.console import Console

        console = Console()
        if pairs is not None:
            published.print_against(pairs, console)
            return
        print_runs(runs, shown, console, pairs=pairs_of_runs, reasons=reasons, details=config.details)
        for line in so_far:
            console.print(line, markup=False, highlight=False, style="yellow", soft_wrap=True)
        if not config.details:
            console.print("All metrics, p-values and notes: the same with --details", highlight=False)
        console.print("Next, every answer and its prompt on a page: the same with --html page.html", highlight=False)
        return
    if pairs is not None:
        text = published.to_csv(pairs) if config.format == "csv" else published.to_markdown(pairs)
    elif config.format == "csv":
        text = to_csv(by_run, pairs_of_runs)
    else:
        text = to_markdown(shown, times_of(runs)) + changed.to_markdown(pairs_of_runs)
        text += "".join(f"\n{reason}\n" for reason in map(in_markdown, [*so_far, *reasons]))
        text += f"\n{averages.to_markdown(averages.together(by_run))}"
    if output is None:
        typer.echo(text, nl=False)
    else:
        write(output, text)


def _unfinished(folders: list[Path]) -> list[str]:
    """Of each run that has not ended, how far it is, and how it goes on."""
    from bench.records.unfinished import unfinished_folder

    return [line for path in folders if (line := unfinished_folder(path)) is not None]


def _print_by(folders: list[Path], by: str, config: ReportConfig) -> None:
    """The rows of each value of a fact, of each run by itself."""
    from bench.records.finished import read_runs
    from bench.report.by import split_by
    from bench.report.terminal import print_comparison
    from bench.report.writing import to_csv, to_markdown

    runs = {run.name: split_by(run, by).rows for run in read_runs(folders) if run.is_run}
    if config.format == "terminal" and config.output is None:
        from rich.console import Console

        for name, rows in runs.items():
            if len(runs) > 1:
                typer.echo(f"\n{name}")
            print_comparison([rows], Console())
        return
    as_csv = config.format == "csv"
    text = to_csv(runs) if as_csv else "\n".join(map(to_markdown, ([rows] for rows in runs.values())))
    if config.output is None:
        typer.echo(text, nl=False)
    else:
        write(config.output, text)


def _shown(folders: list[Path]) -> tuple[list[list[Row]], list[Pair], list[str]]:
    """Rows by table, further runs against the first, and why some must not be compared."""
    from bench.records.finished import read_runs
    from bench.records.row import read_results
    from bench.records.shown import headline
    from bench.report.between import between
    from bench.report.comparison import tables_of

    if len(folders) == 1:
        return [headline(read_results(folders[0]))], [], []
    runs = read_runs(folders)
    tables, reasons = tables_of(runs)
    return tables, between(runs), reasons


def _write_latex(runs: list[Path], latex: Path) -> None:
    from bench.report import between_written as changed
    from bench.report.writing import to_latex

    shown, pairs, _ = _shown(runs)
    write(latex, to_latex(shown) + changed.to_latex(pairs))


def _write_page(runs: list[Path], html: Path | None, figures: Path | None) -> None:
    from bench.records.finished import read_runs
    from bench.report.page import build

    # Samples that are too many for the page stand in a folder beside it.
    page = build(read_runs(runs), html and html.with_suffix(".samples"))
    if html is not None:
        write(html, page.html)
    if figures is not None:
        for figure in page.figures:
            figure.save(figures)
        typer.echo(f"wrote {len(page.figures)} figures to {figures}, each as SVG, PNG and PDF")
