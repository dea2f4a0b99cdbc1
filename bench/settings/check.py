"""Settings of the regression gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bench.settings.fields import Settings, setting

GATE = "What is compared"
TOLERANCES = "Tolerances: how much worse passes although it is beyond noise"

Tolerance = Annotated[float, Field(ge=0, lt=1)]


class CheckConfig(Settings):
    """Everything that ``arkv-bench check`` can be told."""

    run: Path | None = setting(
        None,
        "A run folder.",
        "Arguments",
        "nothing",
        unset="the newest under runs",
        argument=True,
        shown_as="RUN",
    )
    against: Path | None = setting(
        None, "The baseline: a folder that --update wrote, or another run. Needed.", GATE, "nothing", shown_as="FOLDER"
    )
    update: bool = setting(
        False, "Make RUN the new baseline instead of checking it.", GATE, "nothing", unset="", switch=True
    )
    markdown: Path | None = setting(None, "Write the findings as Markdown.", GATE, "nothing", shown_as="FILE")
    partial: bool = setting(
        False, "Let pass what the baseline has and RUN has not measured.", GATE, "nothing", unset="", switch=True
    )
    score_tolerance: Tolerance = setting(
        0.02, "Share of the baseline's score, where more is better.", TOLERANCES, "nothing"
    )
    kl_tolerance: Tolerance | None = setting(
        None,
        "Share of the baseline's KL, perplexity, ... (less is better).",
        TOLERANCES,
        "nothing",
        unset="0.05, or 0.5 where hardware, precision or versions of libraries are not the baseline's",
    )
    lost: Tolerance | None = setting(
        None,
        "Share of the baseline's right answers that may be wrong now, rounded up to whole answers.",
        TOLERANCES,
        "nothing",
        unset="0, or 0.05 where hardware, precision or versions of libraries are not the baseline's",
    )
    bytes_tolerance: Tolerance = setting(0.01, "Share of the baseline's KV bytes.", TOLERANCES, "nothing")
    speed_tolerance: Tolerance | None = setting(
        None,
        "Share of the baseline's tokens/s over those of full in the same run.",
        TOLERANCES,
        "nothing",
        unset="0.03, or 0.25 when the baseline's record names other hardware",
    )
    speed: bool = setting(True, "Judge speed.", TOLERANCES, "nothing")
