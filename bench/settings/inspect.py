"""Settings of a look at one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.settings.fields import Share, again, setting
from bench.settings.run import BUDGETS, OUTPUT, RunConfig, Variant

PROMPT = "The prompt"


class InspectConfig(RunConfig):
    """Everything that ``arkv-bench inspect`` can be told."""

    not_offered: ClassVar[frozenset[str]] = frozenset(RunConfig.model_fields) - {
        *("model", "lengths", "data_dir", "methods", "cache_size", "cache_ratio", "budget_unit", "window_size"),
        *("quant_format", "device", "dtype", "seed", "plugin", "outdir"),
    }

    prompt_file: Path | None = setting(None, "A text file as the prompt.", PROMPT, "nothing", option="--text")
    tokens: Annotated[int, Field(ge=2)] | None = setting(
        None, "Only so many tokens of it, from its begin.", PROMPT, "nothing"
    )
    task: str | None = setting(None, "A document of a task instead, see list tasks.", PROMPT, "nothing")
    doc: str = setting("0", "Which one: its number, from 0, or its id.", PROMPT, "nothing")
    methods: tuple[str | Variant, ...] = again(
        RunConfig, "methods", ("mix",), help="The method: one, at one budget.", unset=None
    )
    cache_ratio: tuple[Share, ...] | None = again(
        RunConfig, "cache_ratio", BUDGETS[:1], unset="0.25, unless --cache-size is given"
    )
    steps: Annotated[int, Field(ge=0)] = setting(16, "Decoding steps that are followed.", PROMPT, "nothing")
    html: Path | None = setting(None, "Write it as one page.", OUTPUT, "nothing")
    model: tuple[str, ...] = again(RunConfig, "model", ("smollm2-135m",), help="Model, see list models.")
    outdir: Path | None = again(
        RunConfig,
        "outdir",
        None,
        help="Write states.json there, which report --html draws, and inspect.json.",
        unset=None,
    )
