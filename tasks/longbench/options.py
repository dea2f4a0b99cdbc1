"""Options of LongBench's tasks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tasks.options import TaskOptions


class LongBenchOptions(TaskOptions):
    """Options of the datasets of ``longbench`` and ``longbench-e``."""

    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="What a prompt without its chat template is cut to, in the middle, as officially. Default: 31,500 "
        "tokens for Llama models, as published, else the model's context.",
    )
    skip_cut: bool = Field(False, description="Leave out documents that would have to be cut, before a limit counts.")
