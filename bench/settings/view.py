"""Settings of the served page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bench.settings.fields import Settings, setting


class ViewConfig(Settings):
    """Everything that ``arkv-bench view`` can be told."""

    run: Path | None = setting(
        None, "A run's folder.", "Arguments", "nothing", unset="the newest under runs", argument=True, shown_as="RUN"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = setting(
        8377, "Port on this machine; 0 takes any that is free.", "What is served", "nothing"
    )
