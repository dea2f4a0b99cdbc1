"""``arkv-bench score``: LongBench's scores of prediction files, whoever wrote them."""

from __future__ import annotations

from typing import Any

import typer

from bench.settings.options import given, takes
from bench.settings.score import ScoreConfig


@takes(ScoreConfig)
def score(**typed: Any) -> None:
    """Score LongBench predictions in the official form: lines with pred, answers, all_classes and length.

    The figures are those of the official evaluation, with averages by category, by language and over all.

    [bold]arkv-bench score runs/longbench[/bold]
    [bold]arkv-bench score LongBench/pred_e --longbench-e --format csv[/bold]
    """
    from bench.report.scores import print_scores, score_folder, to_csv, to_json, to_markdown

    config = ScoreConfig(**given(ScoreConfig, typed))
    scores, ignored = score_folder(config.folder, extended=config.longbench_e)
    for path in ignored:
        typer.echo(f"arkv-bench: ignored {path}: not the name of a dataset", err=True)
    if config.format == "terminal":
        from rich.console import Console

        print_scores(scores, Console())
        return
    write = {"md": to_markdown, "csv": to_csv, "json": to_json}[config.format]
    typer.echo(write(scores), nl=False)
