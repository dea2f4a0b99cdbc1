"""The files of ``arkv-bench speed``: a line of ``speed.csv`` for each repetition of a cell, and the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bench.errors import UserError
from bench.names import RECORD, SPEED
from bench.records.files.csv_ import csv_text, read_models
from bench.records.files.json_ import json_text, read_json
from bench.records.files.numbers import bytes_text
from bench.records.version import FORMAT_VERSION, Versioned

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Natural = Annotated[int, Field(ge=1)]


class Timing(BaseModel):
    """One repetition of one cell with a batch of equal prompts."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True)

    method: str
    quant_format: str | None = None
    context_length: Count
    cache_size: Count | None = None
    prefill_s: Positive
    """Of one prompt, compression included: as the library does it, or (``--shared-prefill``) its reading for all
    methods and the cell's own compression."""
    compress_s: Annotated[float, Field(ge=0)] | None = None
    """Compression alone, of a prefill that is there."""
    ttft_ms: Positive
    """Of one prompt, whatever the batch."""
    tpot_ms: Positive
    """Median over the decoding steps of the batch: what each of its users waits for a token."""
    decode_tokens_per_s: Positive
    """Of all sequences together."""
    kv_bytes: Count
    """Of all sequences together, at the end."""
    peak_memory_bytes: Count | None = None
    """The most that was allocated on the device, weights included; on a CPU resident memory of the process, where the
    system says it."""
    repetition: Count
    batch_size: Natural = 1
    cache_ratio: Positive | None = None
    budget_unit: str | None = None
    one_by_one: bool = False
    """Each sequence of the batch has a forward of its own."""
    step_bytes: Count | None = None
    """What a step has to read at least: weights, once for each forward, and all that the caches hold."""
    bandwidth: Positive | None = None
    """Bytes a second of the memory, measured beside this repetition."""
    kv_memory: Natural | None = None
    """Where the batch is the largest one whose caches fit in so many bytes."""
    cell: str = ""
    """Unique for the settings."""

    @property
    def work(self) -> tuple[str, int, int | None, int | None]:
        """What was timed, whichever repetition it is of."""
        return (self.cell, self.context_length, *asked_batch(self.batch_size, self.kv_memory))


def asked_batch(batch_size: int | None, kv_memory: int | None) -> tuple[int | None, int | None]:
    """A batch as it was asked for: so many sequences, or what fits in so many bytes."""
    return (batch_size, None) if kv_memory is None else (None, kv_memory)


COLUMNS = list(Timing.model_fields)
FIRST_COLUMNS = COLUMNS[: COLUMNS.index("repetition") + 1]
"""Those that every file has; what came later is unknown in older ones."""


def timings_csv(timings: Sequence[Timing]) -> str:
    """All repetitions, one line each, every digit of their times."""
    return csv_text(COLUMNS, timings, digits=None)


def read_timings(file: Path) -> list[Timing]:
    """The repetitions of a ``speed.csv``.

    Raises:
        UserError: not such a file, or a cell that makes no sense (line and column are named).
    """
    timings = read_models(file, Timing, FIRST_COLUMNS, "arkv-bench speed --fresh writes the file anew")
    if not timings:
        raise UserError(f"{file} has no rows")
    return timings


class Untimed(BaseModel):
    """A cell that could not be timed, and why."""

    model_config = ConfigDict(extra="allow", frozen=True)

    cell: str
    label: str
    """For a person: the method, its budget and format."""
    context_length: Count
    batch_size: Natural | None = None
    kv_memory: Natural | None = None
    error: str

    @property
    def work(self) -> tuple[str, int, int | None, int | None]:
        """As :attr:`Timing.work`."""
        return (self.cell, self.context_length, *asked_batch(self.batch_size, self.kv_memory))

    @property
    def line(self) -> str:
        """In one line."""
        batch = f"a batch of {self.batch_size}" if self.kv_memory is None else f"{bytes_text(self.kv_memory)} of KV"
        return f"{self.label}, {batch} behind {self.context_length:,} tokens: {self.error}"


class TimedModel(BaseModel):
    """The model that was timed."""

    model_config = ConfigDict(extra="allow")

    name: str
    fingerprint: str | None = None
    dtype: str | None = None


class SpeedRecord(Versioned):
    """The record of ``arkv-bench speed``."""

    command: str = ""
    finished: str | None = None
    """None while it is under way."""
    model: TimedModel
    hardware: dict[str, Any] = Field(default_factory=dict)
    terms: dict[str, Any] = Field(default_factory=dict)
    """What all rows of the folder have in common beside the model and the hardware."""
    refused: str = ""
    """Why the model has no fused full cache."""
    failures: list[Untimed] = Field(default_factory=list)


_RECORD = TypeAdapter(SpeedRecord)


def read_speed_record(path: Path) -> SpeedRecord:
    """The record beside a ``speed.csv``. Raises :class:`UserError` where it is damaged."""
    return read_json(path / RECORD, _RECORD, f"the record of a {SPEED}")


def speed_record_text(record: SpeedRecord) -> str:
    """What ``record.json`` holds."""
    return json_text({**record.model_dump(exclude_unset=True), "format_version": FORMAT_VERSION})
