"""``arkv-bench list``: what can be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from bench.errors import UserError
from bench.settings.list_ import ListConfig
from bench.settings.options import given, takes

if TYPE_CHECKING:
    from bench.methods.base import Method


@takes(ListConfig)
def list_things(**typed: Any) -> None:
    """List the methods, tasks, models or presets, one line each, with those of installed packages and of --plugin."""
    from rich.console import Console
    from rich.table import Table

    config = ListConfig(**given(ListConfig, typed))
    what, plugin = config.what, config.plugin
    if config.schema_:
        _print_schema(what)
        return
    rows: list[tuple[str, ...]]
    failures: list[dict[str, str]] = []
    if what == "methods":
        from importlib.metadata import entry_points

        from bench.methods.names import METHOD_GROUP, descriptions

        rows = list(descriptions())
        if plugin or entry_points(group=METHOD_GROUP):
            from bench.methods import plugins

            found = plugins.Plugins(plugin or ())
            found.load_installed(plugins.METHODS)
            failures = found.failures
            rows += [(name, _described(own.method)) for name, own in found.methods.items()]
    elif what == "tasks":
        from importlib.metadata import entry_points

        from bench.harness import tasks as harness
        from bench.methods.names import TASK_GROUP
        from tasks.registry import TASKS

        rows = [(name, entry.description) for name, entry in TASKS.items()]
        if plugin or entry_points(group=TASK_GROUP):
            from bench.methods import plugins

            found = plugins.Plugins(plugin or (), harness.HarnessTasks())
            found.load_installed(plugins.TASKS)
            failures = found.failures
            rows += [(name, "a task of a plugin") for name in found.tasks]
        rows += [
            (name, f"{text} (lm-eval; rows from --data-dir or the hub)") for name, text in harness.DESCRIPTIONS.items()
        ]
        rows.append(("NAME", "any other task or group of lm-eval"))
    elif what == "models":
        from bench.models.embedded import list_models
        from bench.progress import MB

        rows = [
            (
                row.name,
                f"{row.description}; licence {row.licence}; "
                f"{row.download / MB:,.0f} MB to fetch, {row.disk / MB:,.0f} MB on disk",
                "fetched already" if row.present else "fetched when used",
            )
            for row in list_models()
        ]
        rows.append(("ORG/NAME", "any causal language model of the Hugging Face hub", ""))
        rows.append(("FOLDER", "a local folder with config.json and safetensors weights", ""))
        rows.append(("FILE.gguf", "a local GGUF file, converted once", ""))
    else:
        from bench.settings.presets import preset_description, preset_names

        rows = [(name, preset_description(name)) for name in preset_names()]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=what == "models", overflow="fold")
    for _ in range(1, max(map(len, rows))):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table, highlight=False, markup=False)
    for failure in failures:
        typer.echo(f"arkv-bench: plugin {failure['plugin']}: {failure['error']}", err=True)
    if failures:
        raise typer.Exit(1)


def _described(method: Method) -> str:
    """A plugin's method in a line."""
    text = method.description or "a method of a plugin"
    return f"{text}: {method.limits}" if method.limits else text


def _print_schema(what: str) -> None:
    import json

    from bench.settings.presets import preset_schema

    if what != "presets":
        raise UserError(f"list {what} --schema: only presets have one: list presets --schema", exit_code=2)
    typer.echo(json.dumps(preset_schema(), indent=2, ensure_ascii=False))
