"""``arkv-bench view``: the page of a run, served to this machine while the run goes on."""

from __future__ import annotations

from typing import Any

import typer

from bench.commands.output import named_or_newest
from bench.errors import UserError
from bench.names import RECORD
from bench.settings.options import given, takes
from bench.settings.view import ViewConfig


@takes(ViewConfig)
def view(**typed: Any) -> None:
    """Serve the page of a run to this machine alone: every document with all answers, and how a run that is under way
    goes.

    It ends with Ctrl-C. The page of report --html is the same in a file.

    [bold]arkv-bench view runs/demo[/bold]
    [bold]arkv-bench view runs/demo --port 9000[/bold]
    """
    import tempfile
    from pathlib import Path

    from bench.records.lacking import no_run_folder
    from bench.runs.kinds import RUN, kind_of

    config = ViewConfig(**given(ViewConfig, typed))
    (run,) = named_or_newest([config.run] if config.run is not None else None)
    held = kind_of(run)
    if held is None:
        raise no_run_folder(run, RECORD)
    if held != RUN:
        raise UserError(f"{run} holds {held}: give the folder of a run", exit_code=2)
    # Figures take a second to import, which a wrong path need not wait for.
    from bench.report.serving import HOST, Site, server_of

    with tempfile.TemporaryDirectory() as place, server_of(Site(run, Path(place)), config.port) as server:
        typer.echo(f"{run}: http://{HOST}:{server.server_port}/ (Ctrl-C ends it)")
        server.serve_forever()
