"""Settings of the timings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.methods.variants import name_of
from bench.names import CEILING, FULL, FUSED
from bench.settings.fields import Count, again, setting
from bench.settings.run import OUTPUT, RunConfig, Variant

TIMING = "What is timed"


class SpeedConfig(RunConfig):
    """Everything that ``arkv-bench speed`` can be told."""

    not_offered: ClassVar[frozenset[str]] = frozenset(RunConfig.model_fields) - {
        *("model", "methods", "cache_size", "cache_ratio", "budget_unit", "quant_format", "window_size", "device"),
        *("dtype", "plugin", "outdir"),
    }

    methods: tuple[str | Variant, ...] = again(
        RunConfig,
        "methods",
        ("origin", "quant", "mix"),
        help="Methods beside the two full caches and the ceiling.",
        unset=None,
    )
    window_size: tuple[Count, ...] = again(RunConfig, "window_size", (32,), unset=None)
    context_lengths: tuple[Count, ...] = setting((2048,), "Prompt lengths in tokens.", TIMING, "grid")
    batch_sizes: tuple[Count, ...] = setting(
        (1,), "Sequences that are decoded side by side: copies of one prompt.", TIMING, "grid"
    )
    kv_memory: tuple[str, ...] = setting(
        (),
        "Time also the largest batch of each method whose caches fit in so many bytes (2GB).",
        TIMING,
        "grid",
        unset="not asked",
    )
    shared_prefill: bool = setting(
        False,
        "Read each prompt once for all methods, as run does, and for all repetitions, which is soon done where there "
        "are many; else each reads it by itself every time, which times its prefill.",
        TIMING,
        "grid",
    )
    new_tokens: Annotated[int, Field(ge=2)] = setting(32, "Decoding steps per measurement.", TIMING, "grid")
    repetitions: Count = setting(3, "Measurements of every cell, all cells in turn.", TIMING, "grid")
    model: tuple[str, ...] = again(RunConfig, "model", ("smollm2-135m",), help="Model, see list models.")
    outdir: Path | None = again(
        RunConfig,
        "outdir",
        None,
        help="Write speed.csv and record.json there, row by row; what is there already is not timed again.",
        panel=OUTPUT,
        unset=None,
    )

    @property
    def timed_methods(self) -> tuple[str | Variant, ...]:
        """Those that were asked for, without the caches that stand beside them in any case."""
        return tuple(method for method in self.methods if method not in (FULL, FUSED, CEILING))

    @property
    def method_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(map(name_of, self.timed_methods))
