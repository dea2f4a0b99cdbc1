"""Options of RULER's tasks."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tasks.options import Count, Lengths, TaskOptions


class RulerOptions(TaskOptions):
    """Options of ``ruler``."""

    lengths: Lengths = Field((2000,), description="Tokens of prompt and answer together, chat template included.")
    samples: Count = Field(8, description="Documents per length.")
    haystack: Path | None = Field(None, description="A text file to hide the needle in. Default: made sentences.")
