"""``arkv-bench check``: the regression gate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.output import named_or_newest, write
from bench.errors import UserError

TOLERANCES = "Tolerances: how much worse passes although it is beyond noise"


def check(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder. Default: the newest under runs.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="The baseline: a folder that --update wrote, or another run. Needed.", show_default=False),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Make RUN the new baseline instead of checking it.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the findings as Markdown.", metavar="FILE", show_default=False)
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Let pass what the baseline has and RUN has not measured.")
    ] = False,
    score_tolerance: Annotated[
        float, typer.Option(help="Share of the baseline's score, where more is better.", rich_help_panel=TOLERANCES)
    ] = 0.02,
    kl_tolerance: Annotated[
        float,
        typer.Option(help="Share of the baseline's KL, perplexity, ... (less is better).", rich_help_panel=TOLERANCES),
    ] = 0.05,
    lost: Annotated[
        float | None,
        typer.Option(
            help="Share of the baseline's right answers that may be wrong now, rounded up to whole answers. "
            "Default: 0, or 0.05 where hardware, precision or versions of libraries are not the baseline's.",
            rich_help_panel=TOLERANCES,
            show_default=False,
        ),
    ] = None,
    bytes_tolerance: Annotated[
        float, typer.Option(help="Share of the baseline's KV bytes.", rich_help_panel=TOLERANCES)
    ] = 0.01,
    speed_tolerance: Annotated[
        float | None,
        typer.Option(
            help="Share of the baseline's tokens/s over those of full in the same run. "
            "Default: 0.03, or 0.25 when the baseline's record names other hardware.",
            rich_help_panel=TOLERANCES,
            show_default=False,
        ),
    ] = None,
    no_speed: Annotated[
        bool, typer.Option("--no-speed", help="Do not judge speed.", rich_help_panel=TOLERANCES)
    ] = False,
) -> None:
    """Fail when a run is worse than a baseline: scores, KL divergence, KV bytes, tokens/s over full's.

    Both must have answered the same documents with the same model. A change fails when its whole 95 % interval over
    the documents lies beyond the tolerance, and so does an answer that was right and is wrong now. Exit codes: 0
    passed, 1 worse or incomplete, 2 must not be compared, or what was asked for makes no sense.

    [bold]arkv-bench run --preset ci --outdir runs/ci[/bold]
    [bold]arkv-bench check runs/ci --against results/ci --markdown check.md[/bold]
    [bold]arkv-bench check runs/ci --against results/ci --update[/bold]
    """
    if against is None:
        raise UserError("give --against FOLDER, the baseline: a folder that --update wrote, or another run", 2)
    (folder,) = named_or_newest([run] if run is not None else None)

    from bench.gate.comparing import changes
    from bench.gate.comparing import check as compare
    from bench.gate.findings import Tolerances
    from bench.gate.reading import read, write_baseline
    from bench.gate.writing import lines, summary, to_markdown
    from bench.records.files.numbers import bytes_text

    tolerances = Tolerances(
        score=score_tolerance,
        divergence=kl_tolerance,
        lost=lost,
        kv_bytes=bytes_tolerance,
        speed=speed_tolerance,
        judge_speed=not no_speed,
    )
    if update:
        changed = changes(folder, against)
        size = write_baseline(folder, against)
        typer.echo(f"wrote {against}, {bytes_text(size)}")
        for line in changed:
            typer.echo(f"against the one before: {line}")
        return
    report = compare(read(folder), read(against), tolerances, partial=partial)
    for line in lines(report):
        typer.echo(line)
    typer.echo(summary(report))
    text = to_markdown(report)
    if markdown is not None:
        write(markdown, text, quiet=True)
    if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with open(summary_file, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{summary_file}: cannot be written ({error.strerror})") from None
    if report.failed:
        raise typer.Exit(1)
