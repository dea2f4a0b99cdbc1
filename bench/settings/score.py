"""Settings of the scoring of prediction files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bench.settings.fields import Settings, setting

TABLES = "What is shown"


class ScoreConfig(Settings):
    """Everything that ``arkv-bench score`` can be told."""

    folder: Path = setting(
        ...,
        "A folder of <dataset>.jsonl, of such folders (the official pred or pred_e), or a run folder.",
        "Arguments",
        "nothing",
        argument=True,
        shown_as="FOLDER",
    )
    longbench_e: bool = setting(
        False, "Score by length as well, as LongBench-E does.", TABLES, "nothing", unset="", switch=True
    )
    format: Literal["terminal", "md", "csv", "json"] = setting("terminal", "How scores are written.", TABLES, "nothing")
