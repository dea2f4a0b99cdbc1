"""A row of ``curve.csv``: divergence from the full cache at one position behind the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from bench.records.files.csv_ import csv_text


class CurveRow(BaseModel):
    """One model, task, cell and position; see :mod:`bench.judge.curve`."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    model: str
    task: str
    method: str
    quant_format: str | None = None
    budget_unit: str | None = None
    cache_size: int | None = None
    cache_ratio: float | None = None
    window_size: int | None = None
    position: int
    """Tokens read behind the prompt, from 1."""
    n: int
    """Prompts that have so many."""
    kl: float
    kl_p95: float
    cell: str


CURVE_COLUMNS = list(CurveRow.model_fields)


def curve_csv(rows: Sequence[CurveRow]) -> str:
    """The file."""
    return csv_text(CURVE_COLUMNS, rows)
