"""``arkv-bench run``: the main job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import NOBODY_READS, UserError, close_output, nobody_reads
from bench.settings.options import FRESH, PRESET, given, takes
from bench.settings.run import OUTPUT, RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from bench.runs.run import Outcome


@takes(RunConfig)
def run(
    preset: PRESET = None,
    fresh: FRESH = False,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Print the settings and where each comes from, checked as a run checks them, and stop.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    **typed: Any,
) -> None:
    """Compare cache methods: answers kept, true KV bytes, speed.

    Each document's prompt is computed once; every method compresses its own copy of the cache and answers from it.
    Lists are comma-separated.

    [bold]arkv-bench run --preset demo[/bold]
    [bold]arkv-bench run --tasks needle,gsm8k --data-dir DATA --methods full,mix --cache-size 512,1024[/bold]
    """
    from bench.commands.first_look import first_look
    from bench.settings.presets import resolve

    config, origin = resolve(given(RunConfig, typed), preset)
    first_look(config)
    if print_config:
        shown = config.to_json()
        width = max(map(len, shown))
        for name, value in shown.items():
            typer.echo(f"{name:{width}}  {value!s:44}  {origin[name]}")
        return

    from rich.console import Console

    from bench.models.imports import import_lightly

    import_lightly()
    from bench.runs.folder import DISK_FULL
    from bench.runs.kinds import new_folder
    from bench.runs.run import execute

    console = Console()
    path = config.outdir or new_folder(Path(preset).stem if preset else None)
    again = f"the same command with --outdir {path} continues"
    try:
        outcome = execute(config, path, console, fresh=fresh, origin=origin)
    except KeyboardInterrupt:
        message = f"stopped; what was measured is in {path}: {again}"
        raise UserError(message, exit_code=130) from None
    except (OSError, SystemExit) as error:
        if nobody_reads(error):
            close_output(sys.stdout)
            message = f"stopped, since nobody reads what it prints; what was measured is in {path}: {again}"
            raise UserError(message, exit_code=NOBODY_READS) from None
        if not isinstance(error, OSError) or not error.strerror:
            raise
        if error.errno in DISK_FULL:
            raise UserError(f"stopped: {error.strerror}; free some: {again}") from None
        raise UserError(f"stopped: {error.filename or path}: {error.strerror}; {again}") from error
    _summarize(outcome, console)
    if outcome.failures:
        raise typer.Exit(1)


def _summarize(outcome: Outcome, console: Console) -> None:
    """The answer and the tables, what failed, where everything is, and what to type next."""
    import shlex

    from bench.records.finished import Run, record_of
    from bench.records.shown import headline
    from bench.report.terminal import print_runs
    from bench.runs.failures import failure_lines

    if asked_for := headline(outcome.rows):
        run = Run(name=outcome.path.name, rows=outcome.rows, record=record_of(outcome.path))
        print_runs([run], [asked_for], console)
    if parts := len({row.task for row in outcome.rows} - {row.task for row in asked_for}):
        console.print(f"{parts} tasks and groups that these consist of have rows of their own in results.csv.")
    if outcome.failures:
        typer.echo("arkv-bench: not everything could be measured:", err=True)
        for line in failure_lines(outcome.failures):
            typer.echo(f"  {line}", err=True)
    folder = shlex.quote(str(outcome.path))
    after = [f"Run folder: {outcome.path}"]
    if outcome.failures:
        after.append(f"What failed is tried again by the same command with --outdir {folder}")
    if outcome.rows:
        after.append(f"All metrics, p-values and notes: arkv-bench report {folder} --details")
        after.append(f"Next, a page to look at: arkv-bench report {folder} --html page.html")
    for line in after:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
