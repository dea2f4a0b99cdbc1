"""Settings of the look at a machine."""

from __future__ import annotations

from pathlib import Path

from bench.settings.fields import Settings, setting


class DoctorConfig(Settings):
    """Everything that ``arkv-bench doctor`` can be told."""

    data_dir: Path | None = setting(
        None, "A folder with local rows to check.", "What is looked at", "nothing", shown_as="FOLDER"
    )
