"""Settings of a search: those of a run that say what is searched on, and its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.names import LEAST_DOCUMENTS
from bench.settings.fields import Count, again, setting
from bench.settings.run import METHOD_SETTINGS, RunConfig, Variant

SEARCH = "The search"


class TuneSettings(RunConfig):
    """Everything that ``arkv-bench tune`` can be told."""

    not_offered: ClassVar[frozenset[str]] = frozenset(RunConfig.model_fields) - {
        *("tasks", "methods", "cache_size", "cache_ratio", "budget_unit", "quant_format", "window_size", "limit"),
        *("model", "lengths", "continuation", "text", "text_field", "haystack", "data_dir", "prefill_chunk"),
        *("max_length", "device", "dtype", "seed", "outdir", "plugin"),
    }

    tasks: tuple[str, ...] = again(
        RunConfig,
        "tasks",
        ("fidelity",),
        help="What trials are measured by: fidelity (KL divergence to the full cache), tasks with a score (their "
        "mean), or both, such as fidelity,needle: then the Pareto front is searched.",
        panel=SEARCH,
    )
    n_trials: Count = setting(30, "Trials of the study, those of an earlier run included.", SEARCH, "nothing")
    methods: tuple[str | Variant, ...] = again(
        RunConfig, "methods", ("mix",), help="The method whose settings are searched.", panel=SEARCH, unset=None
    )
    params: tuple[str, ...] | None = setting(
        None,
        f"Settings that are searched: {', '.join(METHOD_SETTINGS)}, window_size; those of a plugin's settings_space.",
        SEARCH,
        "answer",
        unset="in tokens the first four, in bytes those that matter there",
    )
    limit: Count | None = again(RunConfig, "limit", 8, help="Tuning documents of each task.", panel=SEARCH)
    held_out: Annotated[int, Field(ge=LEAST_DOCUMENTS)] = setting(
        16, "Other documents of each task, which the report is about.", SEARCH, "nothing"
    )
    chunk: Count | None = setting(
        None,
        "fidelity: tokens of a continuation that are read at once; 1 is decoding.",
        SEARCH,
        "answer",
        unset="all",
    )
    batch: Count = setting(
        5, "Tasks with a score: trials that are drawn together and share the prefills.", SEARCH, "nothing"
    )
    keep_gib: Annotated[float, Field(ge=0)] = setting(
        4.0,
        "fidelity: GiB for prefills that all trials share; the others are computed each time.",
        SEARCH,
        "speed",
    )
    window_size: tuple[Count, ...] = again(
        RunConfig,
        "window_size",
        (32,),
        help="Newest tokens at model precision, unless it is searched.",
        panel=SEARCH,
    )
    lengths: tuple[Count, ...] = again(RunConfig, "lengths", (2048,))
    model: tuple[str, ...] = again(RunConfig, "model", ("smollm2-135m",), help="Model, see list models.")
    outdir: Path | None = again(
        RunConfig, "outdir", None, help="Folder of the study, or of one to be continued.", unset="runs/TIME-tune"
    )
