"""The command line and its exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from bench import errors
from bench.commands import check, doctor, inspect, list_, plan, report, run, score, speed, tune, view
from bench.errors import UserError
from tasks.base import TaskError

EXIT_CODES = {
    0: "done",
    1: "something failed on the way, or check found a regression",
    2: "usage error",
    130: "stopped by Ctrl-C",
    errors.NOBODY_READS: "nobody reads what it prints",
}

BUG = (
    "this is a bug of arkv-bench, not of what you asked for: please open an issue at the project with the command and "
    "all that follows"
)


class _Command(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Printed as the suite prints helps: Typer's own cuts names."""
        from bench.commands.helping import print_help

        print_help(self, ctx)


class _Group(TyperGroup):
    format_help = _Command.format_help


app = typer.Typer(
    name="arkv-bench",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="At this memory budget, which KV-cache method keeps a model's answers, and what does it cost? "
    "Start with [bold]arkv-bench run --preset demo[/bold]: it needs no download but the default model.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    rich_markup_mode="rich",
)
app.command("run", cls=_Command)(run.run)
app.command("plan", cls=_Command)(plan.plan)
app.command("report", cls=_Command)(report.report)
app.command("view", cls=_Command)(view.view)
app.command("check", cls=_Command)(check.check)
app.command("score", cls=_Command)(score.score)
app.command("speed", cls=_Command)(speed.speed)
app.command("tune", cls=_Command)(tune.tune)
app.command("inspect", cls=_Command)(inspect.inspect)
app.command("list", cls=_Command)(list_.list_things)
app.command("doctor", cls=_Command)(doctor.doctor)


@app.callback(invoke_without_command=True)
def _of_all(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    traceback: bool = typer.Option(
        False, "--traceback", help="Of whatever fails, show the whole traceback too (or ARKV_TRACEBACK=1)."
    ),
) -> None:
    if traceback:
        errors.SHOW_TRACEBACK = True
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"arkv-bench {version_of('arkv-bench')}")
        raise typer.Exit


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """``--quant_type=mix`` is ``--quant-type=mix``: underscores in option names, never in values, become dashes."""
    spelled: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*spelled, *arguments[position:]]
        name, equals, value = argument.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return spelled


def traceback_first(arguments: Sequence[str]) -> list[str]:
    """``report RUN --traceback`` is ``--traceback report RUN``: it can be added to the line that failed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, values = arguments[:end], arguments[end:]
    moved = [argument for argument in options if argument == "--traceback"][:1]
    return [*moved, *(argument for argument in options if argument != "--traceback"), *values]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``arkv-bench``; exits with one of :data:`EXIT_CODES`."""
    # Progress bars of libraries would write over ours; the environment decides when it already has an opinion.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    typed = with_dashes(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            app(traceback_first(typed), standalone_mode=True)
        finally:
            # What is still to be written may find nobody.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as error:
        if errors.nobody_reads(error):
            errors.close_output(sys.stdout)
            _tell("arkv-bench: nobody reads what it prints; stopped")
            sys.exit(errors.NOBODY_READS)
        if (explained := _explain(error)) is not None:
            message, code = explained
            if errors.SHOW_TRACEBACK:
                _tell(errors.whole_traceback(error).rstrip("\n"))
            _tell(f"arkv-bench: {message}")
            sys.exit(code)
        if isinstance(error, Exception):
            _tell(f"arkv-bench: {BUG}")
        raise


def _tell(text: str) -> None:
    """On standard error, which may go into the pipe that nobody reads, too (``2>&1 | head``)."""
    try:
        typer.echo(text, err=True)
    except BrokenPipeError:
        errors.close_output(sys.stderr)


def _explain(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code of an error that is the user's to mend; None for any other one."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, TaskError):
        return str(error), 2 if error.usage else 1
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}", 1
    # Only a command that has used the library can have raised its error.
    config = sys.modules.get("arkv.config")
    if config is not None and isinstance(error, config.ConfigError):
        return str(error), 2
    return None


if __name__ == "__main__":
    main()
