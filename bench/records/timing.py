"""The files of ``arkv-bench speed``: a line of ``speed.csv`` per repetition of a cell, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bench.errors import UserError
from bench.names import CEILING, FULL, FUSED, RECORD, SPEED
from bench.records.files.csv_ import csv_text, read_models
from bench.records.files.json_ import json_text, read_json
from bench.records.version import FORMAT_VERSION, Versioned

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Timing(BaseModel):
    """One repetition of one cell."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True)

    method: str
    quant_format: str | None = None
    context_length: Count
    cache_size: Count | None = None
    prefill_s: Positive
    """The whole prompt, compression included, as the library does it."""
    compress_s: Annotated[float, Field(ge=0)] | None = None
    """Compression alone, of a prefill that is there."""
    ttft_ms: Positive
    tpot_ms: Positive
    """Median over the decoding steps."""
    decode_tokens_per_s: Positive
    kv_bytes: Count
    peak_memory_bytes: Count | None = None
    """Device memory, weights included; unknown on the CPU."""
    repetition: Count


COLUMNS = list(Timing.model_fields)


def timings_csv(timings: Sequence[Timing]) -> str:
    """All repetitions, one line each, every digit of their times."""
    return csv_text(COLUMNS, timings, digits=None)


def read_timings(file: Path) -> list[Timing]:
    """The repetitions of a ``speed.csv``.

    Raises:
        UserError: not such a file, or a cell that makes no sense (line and column are named).
    """
    timings = read_models(file, Timing, COLUMNS, "arkv-bench speed writes the file anew")
    if not timings:
        raise UserError(f"{file} has no rows")
    return timings


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
    model: TimedModel
    hardware: dict[str, Any] = Field(default_factory=dict)


_RECORD = TypeAdapter(SpeedRecord)


def read_speed_record(path: Path) -> SpeedRecord:
    """The record beside a ``speed.csv``. Raises :class:`UserError` where it is damaged."""
    return read_json(path / RECORD, _RECORD, f"the record of a {SPEED}")


def speed_record_text(record: SpeedRecord) -> str:
    """What ``record.json`` holds."""
    return json_text({**record.model_dump(exclude_unset=True), "format_version": FORMAT_VERSION})


class SpeedRow(BaseModel):
    """A cell over its repetitions: medians, the spread of ms per token, and ratios to ``full`` and the ceiling of the
    same context, which are medians over repetitions of the ratio within a repetition."""

    model_config = ConfigDict(extra="forbid")

    context_length: int
    cache_size: int | None
    method: str
    quant_format: str | None
    prefill_s: float
    prefill_vs_full: float | None
    compress_s: float | None
    ttft_ms: float
    tpot_ms: float
    tpot_min: float
    tpot_max: float
    decode_tokens_per_s: float
    vs_full: float | None
    """How many times faster it decodes than the stock full cache."""
    vs_fused: float | None
    """The same of the full cache that the suite's own kernel reads; None in files written before it was timed."""
    vs_ceiling: float | None
    kv_bytes: float


def summarize(timings: Sequence[Timing]) -> list[SpeedRow]:
    """A row per cell, in the order of first appearance."""
    by_cell: dict[tuple[int, int | None, str, str | None], list[Timing]] = {}
    for item in timings:
        key = (item.context_length, item.cache_size, item.method, item.quant_format)
        by_cell.setdefault(key, []).append(item)
    rows = []
    for (length, size, method, quant_format), mine in by_cell.items():
        full = by_cell.get((length, None, FULL, None), [])
        fused = by_cell.get((length, None, FUSED, None), [])
        ceiling = by_cell.get((length, size, CEILING, None), [])
        tpot = [item.tpot_ms for item in mine]
        compress = [item.compress_s for item in mine if item.compress_s is not None]
        rows.append(
            SpeedRow(
                context_length=length,
                cache_size=size,
                method=method,
                quant_format=quant_format,
                prefill_s=median(item.prefill_s for item in mine),
                prefill_vs_full=_ratio(mine, full, "prefill_s"),
                compress_s=median(compress) if compress else None,
                ttft_ms=median(item.ttft_ms for item in mine),
                tpot_ms=median(tpot),
                tpot_min=min(tpot),
                tpot_max=max(tpot),
                decode_tokens_per_s=median(item.decode_tokens_per_s for item in mine),
                vs_full=_ratio(mine, full, "decode_tokens_per_s"),
                vs_fused=_ratio(mine, fused, "decode_tokens_per_s"),
                vs_ceiling=_ratio(mine, ceiling, "decode_tokens_per_s"),
                kv_bytes=median(item.kv_bytes for item in mine),
            )
        )
    return rows


def _ratio(mine: Sequence[Timing], other: Sequence[Timing], name: str) -> float | None:
    """Median over repetitions of this cell's number over the other's."""
    theirs = {item.repetition: getattr(item, name) for item in other}
    ratios = [getattr(item, name) / theirs[item.repetition] for item in mine if item.repetition in theirs]
    return median(ratios) if ratios else None
