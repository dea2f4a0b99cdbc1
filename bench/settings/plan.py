"""Settings of a plan: those of the run, and of the cluster that it would run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.settings.fields import Count, setting
from bench.settings.run import RunConfig

CLUSTER, MEMORY = "The cluster", "What memory buys"


class PlanConfig(RunConfig):
    """Everything that ``arkv-bench plan`` can be told."""

    not_offered: ClassVar[frozenset[str]] = frozenset(
        {"executor", "address", "workers", "gpus_per_worker", "cpus_per_worker", "retries", "states", "outdir"}
    )
    """Settings of a run that change nothing here."""

    capacity: tuple[str, ...] = setting(
        (),
        "Say instead what memory buys, of so many bytes (80GB) or a GPU (h100): tokens in the pool, concurrent "
        "sequences, the most tokens a second. Needs a model's config only.",
        MEMORY,
        "nothing",
        unset="not asked",
    )
    context_lengths: tuple[Count, ...] = setting(
        (4096, 32768), "Tokens of the sequences that capacity is said for.", MEMORY, "nothing"
    )
    bandwidth: Annotated[float, Field(gt=0)] | None = setting(
        None, "GB/s of the memory; a GPU of the table has its maker's.", MEMORY, "nothing", unset="unknown"
    )
    run: Path | None = setting(
        None, "A run whose scores stand beside the methods that it measured.", MEMORY, "nothing", unset="none"
    )
    gpus: Count = setting(1, "GPUs of the cluster.", CLUSTER, "nothing")
    gpu_memory: str = setting("80GB", "Memory of each, as 80GB or 24GiB.", CLUSTER, "nothing")
    worker_gpus: Annotated[float, Field(gt=0)] = setting(
        1.0, "GPUs of a worker.", CLUSTER, "nothing", unset="1", option="--gpus-per-worker"
    )
    calibration_model: str = setting(
        "smollm2-135m",
        "What is timed on this machine; its times are scaled by the number of parameters.",
        CLUSTER,
        "nothing",
    )
    calibrate: bool = setting(
        True, "Time a few prompts on this machine, for an estimate of the time.", CLUSTER, "nothing"
    )
    speedup: Annotated[float, Field(gt=0)] = setting(
        1.0, "How many times faster than this machine a worker is, as far as you know.", CLUSTER, "nothing", unset="1"
    )
