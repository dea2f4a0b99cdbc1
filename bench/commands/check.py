"""``arkv-bench check``: the regression gate."""

from __future__ import annotations

import os
from typing import Any

import typer

from bench.commands.output import named_or_newest, write
from bench.errors import UserError
from bench.settings.check import CheckConfig
from bench.settings.options import given, takes


@takes(CheckConfig)
def check(**typed: Any) -> None:
    """Fail when a run is worse than a baseline: scores, KL divergence, KV bytes, tokens/s over full's.

    Both must have answered the same documents with the same model. A change fails when its whole 95 % interval over
    the documents lies beyond the tolerance, and so does an answer that was right and is wrong now. Exit codes: 0
    passed, 1 worse or incomplete, 2 must not be compared, or a usage error.

    [bold]arkv-bench run --preset ci --outdir runs/ci[/bold]
    [bold]arkv-bench check runs/ci --against results/ci --markdown check.md[/bold]
    [bold]arkv-bench check runs/ci --against results/ci --update[/bold]
    """
    config = CheckConfig(**given(CheckConfig, typed))
    against = config.against
    if against is None:
        raise UserError("give --against FOLDER, the baseline: a folder that --update wrote, or another run", 2)
    (folder,) = named_or_newest(None if config.run is None else [config.run])

    from bench.gate.comparing import changes
    from bench.gate.comparing import check as compare
    from bench.gate.findings import Tolerances
    from bench.gate.reading import read, write_baseline
    from bench.gate.writing import lines, summary, to_markdown
    from bench.records.files.numbers import bytes_text

    tolerances = Tolerances(
        score=config.score_tolerance,
        divergence=config.kl_tolerance,
        lost=config.lost,
        kv_bytes=config.bytes_tolerance,
        speed=config.speed_tolerance,
        judge_speed=config.speed,
    )
    if config.update:
        changed = changes(folder, against)
        size = write_baseline(folder, against)
        typer.echo(f"wrote {against}, {bytes_text(size)}")
        for line in changed:
            typer.echo(f"against the one before: {line}")
        return
    report = compare(read(folder), read(against), tolerances, partial=config.partial)
    for line in lines(report):
        typer.echo(line)
    typer.echo(summary(report))
    text = to_markdown(report)
    if config.markdown is not None:
        write(config.markdown, text, quiet=True)
    if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with open(summary_file, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{summary_file}: cannot be written ({error.strerror})") from None
    if report.failed:
        raise typer.Exit(1)
