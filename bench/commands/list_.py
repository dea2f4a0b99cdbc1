"""``arkv-bench list``: what can be asked for."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class What(str, Enum):
    """What can be listed."""

    METHODS = "methods"
    TASKS = "tasks"
    MODELS = "models"
    PRESETS = "presets"


def list_things(
    what: Annotated[What, typer.Argument(help="methods, tasks, models or presets.", show_default=False)],
) -> None:
    """List the methods, tasks, models or presets, one line each."""
    from rich.console import Console
    from rich.table import Table

    rows: list[tuple[str, ...]]
    if what is What.METHODS:
        from bench import peers
        from bench.methods import DESCRIPTIONS

        rows = [*DESCRIPTIONS.items(), *peers.descriptions()]
    elif what is What.TASKS:
        from bench import harness
        from tasks.registry import TASKS

        rows = [(name, entry.description) for name, entry in TASKS.items()]
        rows += [
            (name, f"{text} (lm-eval; rows from --data-dir or the hub)") for name, text in harness.DESCRIPTIONS.items()
        ]
        rows.append(("NAME", "any other task or group of lm-eval"))
    elif what is What.MODELS:
        from bench.models import list_models

        rows = [
            (
                row.name,
                row.description,
                f"licence {row.licence}",
                "in the cache" if row.present else "fetched when used",
            )
            for row in list_models()
        ]
        rows.append(("ORG/NAME", "any causal language model of the Hugging Face hub", "", ""))
        rows.append(("FOLDER", "a local folder with config.json and safetensors weights", "", ""))
        rows.append(("FILE.gguf", "a local GGUF file, converted once", "", ""))
    else:
        from bench.config import preset_description, preset_names

        rows = [(name, preset_description(name)) for name in preset_names()]
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(max(map(len, rows))):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table, highlight=False, markup=False)
