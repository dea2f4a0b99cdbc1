"""Settings of the lists."""

from __future__ import annotations

from typing import Literal

from bench.settings.fields import Settings, again, setting
from bench.settings.run import RunConfig

LISTED = "What is listed"


class ListConfig(Settings):
    """Everything that ``arkv-bench list`` can be told."""

    what: Literal["methods", "tasks", "models", "presets"] = setting(
        ..., "What to list.", "Arguments", "nothing", argument=True
    )
    schema_: bool = setting(
        False,
        "presets: a JSON schema of them, for editors.",
        LISTED,
        "nothing",
        unset="",
        option="--schema",
        switch=True,
    )
    plugin: tuple[str, ...] | None = again(
        RunConfig,
        "plugin",
        None,
        help="Python files with methods or tasks of your own; may be repeated.",
        panel=LISTED,
        affects="nothing",
    )
