"""``arkv-bench score``: LongBench's scores of prediction files, whoever wrote them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    """How scores are written."""

    TERMINAL = "terminal"
    MARKDOWN = "md"
    CSV = "csv"
    JSON = "json"


def score(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder of <dataset>.jsonl, of such folders (the official pred or pred_e), or a run folder.",
            show_default=False,
        ),
    ],
    longbench_e: Annotated[
        bool, typer.Option("--longbench-e", help="Score by length as well, as LongBench-E does.")
    ] = False,
    format: Annotated[Format, typer.Option(help="terminal, md, csv or json.")] = Format.TERMINAL,
) -> None:
    """Score LongBench predictions in the official form: lines with pred, answers, all_classes and length.

    The figures are those of the official evaluation, with averages by category, by language and over all.

    [bold]arkv-bench score runs/longbench[/bold]
    [bold]arkv-bench score LongBench/pred_e --longbench-e --format csv[/bold]
    """
    from bench.report.scores import print_scores, score_folder, to_csv, to_json, to_markdown

    scores, ignored = score_folder(folder, extended=longbench_e)
    for path in ignored:
        typer.echo(f"arkv-bench: ignored {path}: not the name of a dataset", err=True)
    if format is Format.TERMINAL:
        from rich.console import Console

        print_scores(scores, Console())
        return
    write = {Format.MARKDOWN: to_markdown, Format.CSV: to_csv, Format.JSON: to_json}[format]
    typer.echo(write(scores), nl=False)
