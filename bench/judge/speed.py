"""What timings say: medians, ratios to the full caches, and how the time of a token grows with the context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import linear_regression, median
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from bench.names import CEILING, FULL, FUSED
from bench.records.timing import Timing, asked_batch


class SpeedRow(BaseModel):
    """A cell over its repetitions: medians, the spread of ms per token, and ratios to ``full`` and the ceiling of the
    same context and batch, which are medians over repetitions of the ratio within a repetition. At a fixed memory each
    has the batch that fits, and ratios are those of all tokens per second."""

    model_config = ConfigDict(extra="forbid")

    context_length: int
    batch_size: int
    kv_memory: int | None
    cache_size: int | None
    cache_ratio: float | None
    budget_unit: str | None
    method: str
    quant_format: str | None
    one_by_one: bool
    prefill_s: float
    prefill_vs_full: float | None
    compress_s: float | None
    ttft_ms: float
    tpot_ms: float
    tpot_min: float
    tpot_max: float
    decode_tokens_per_s: float
    vs_full: float | None
    """How many times more tokens per second than the stock full cache."""
    vs_fused: float | None
    """The same of the full cache that the suite's own kernel reads; None in files written before it was timed."""
    vs_ceiling: float | None
    kv_bytes: float
    step_bytes: float | None
    bandwidth: float | None
    """Bytes a second of the memory."""
    bandwidth_share: float | None
    """Bytes that a step has to read, over its time and the bandwidth of the memory (MBU)."""
    peak_memory_bytes: float | None

    @property
    def user_tokens_per_s(self) -> float:
        """Of each sequence."""
        return 1000.0 / self.tpot_ms

    @property
    def budget(self) -> str:
        """Short: tokens per layer or a share of the prompt."""
        if self.cache_ratio is not None:
            return f"{100 * self.cache_ratio:g} %"
        return "" if self.cache_size is None else str(self.cache_size)

    @property
    def series(self) -> tuple[str, str, str, str]:
        """What rows have in common that differ in context and batch only."""
        return self.method, self.quant_format or "", self.budget, self.budget_unit or ""


def _cell_of(timing: Timing) -> Any:
    """What is the same over repetitions, contexts and batches; older files do not name the cell."""
    return timing.cell or (timing.method, timing.quant_format, timing.cache_size)


def summarize(timings: Sequence[Timing]) -> list[SpeedRow]:
    """A row per cell, context and batch, in the order of first appearance."""
    by_work: dict[tuple[Any, ...], list[Timing]] = {}
    by_name: dict[tuple[Any, ...], list[Timing]] = {}
    for item in timings:
        where = (item.context_length, *asked_batch(item.batch_size, item.kv_memory))
        by_work.setdefault((*where, _cell_of(item)), []).append(item)
        if item.method in (FULL, FUSED):
            by_name.setdefault((*where, item.method), []).append(item)
        elif item.method == CEILING:
            by_name.setdefault((*where, CEILING, item.cache_size, item.cache_ratio), []).append(item)
    rows = []
    for (length, batch_size, kv_memory, _), mine in by_work.items():
        first, where = mine[0], (length, batch_size, kv_memory)
        full, fused = (by_name.get((*where, name), []) for name in (FULL, FUSED))
        ceiling = by_name.get((*where, CEILING, first.cache_size, first.cache_ratio), [])
        tpot = [item.tpot_ms for item in mine]
        rows.append(
            SpeedRow(
                context_length=first.context_length,
                batch_size=first.batch_size,
                kv_memory=first.kv_memory,
                cache_size=first.cache_size,
                cache_ratio=first.cache_ratio,
                budget_unit=first.budget_unit,
                method=first.method,
                quant_format=first.quant_format,
                one_by_one=first.one_by_one,
                prefill_s=median(item.prefill_s for item in mine),
                prefill_vs_full=_ratio(mine, full, "prefill_s"),
                compress_s=_median(item.compress_s for item in mine),
                ttft_ms=median(item.ttft_ms for item in mine),
                tpot_ms=median(tpot),
                tpot_min=min(tpot),
                tpot_max=max(tpot),
                decode_tokens_per_s=median(item.decode_tokens_per_s for item in mine),
                vs_full=_ratio(mine, full, "decode_tokens_per_s"),
                vs_fused=_ratio(mine, fused, "decode_tokens_per_s"),
                vs_ceiling=_ratio(mine, ceiling, "decode_tokens_per_s"),
                kv_bytes=median(item.kv_bytes for item in mine),
                step_bytes=_median(item.step_bytes for item in mine),
                bandwidth=_median(item.bandwidth for item in mine),
                bandwidth_share=_median(map(_bandwidth_share, mine)),
                peak_memory_bytes=_median(item.peak_memory_bytes for item in mine),
            )
        )
    return rows


def _bandwidth_share(timing: Timing) -> float | None:
    if timing.step_bytes is None or timing.bandwidth is None:
        return None
    return 1000.0 * timing.step_bytes / timing.tpot_ms / timing.bandwidth


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratio(mine: Sequence[Timing], other: Sequence[Timing], name: str) -> float | None:
    """Median over repetitions of this cell's number over the other's."""
    theirs = {item.repetition: getattr(item, name) for item in other}
    ratios = [getattr(item, name) / theirs[item.repetition] for item in mine if item.repetition in theirs]
    return median(ratios) if ratios else None


class Line(NamedTuple):
    """Milliseconds of a step over the context, as a straight line."""

    slope: float
    """Per token."""
    intercept: float


class Growth(BaseModel):
    """How a cell's time of a step grows with the context, at one batch size: a line by least squares."""

    model_config = ConfigDict(extra="forbid")

    row: SpeedRow
    """At the longest context."""
    lengths: int
    """Contexts that it goes through."""
    slope: float
    """Milliseconds per token of context."""
    intercept: float
    """Milliseconds without any."""
    kv_bandwidth: float | None
    """Bytes a second at which what the cache holds more of behind longer contexts is read; None where it holds no more
    there, or takes no longer."""
    kv_bandwidth_share: float | None
    """That over the bandwidth of the memory."""
    over_full: str
    """From which context on it decodes faster than the stock full cache, in words."""
    over_fused: str


def growths(rows: Sequence[SpeedRow]) -> list[Growth]:
    """One for each cell and batch size that was timed behind two contexts or more."""
    found: dict[tuple[int, tuple[str, ...]], list[SpeedRow]] = {}
    for row in rows:
        if row.kv_memory is None:
            found.setdefault((row.batch_size, row.series), []).append(row)
    lines = {
        key: Line(*linear_regression([row.context_length for row in mine], [row.tpot_ms for row in mine]))
        for key, mine in found.items()
        if len({row.context_length for row in mine}) > 1
    }
    of_full = {(batch, series[0]): line for (batch, series), line in lines.items() if series[0] in (FULL, FUSED)}
    speeds = {key: _kv_bandwidth(found[key]) for key in lines}
    return [
        Growth(
            row=max(found[key], key=lambda row: row.context_length),
            lengths=len(found[key]),
            slope=line.slope,
            intercept=line.intercept,
            kv_bandwidth=speeds[key],
            kv_bandwidth_share=_over(speeds[key], _median(row.bandwidth for row in found[key])),
            over_full="" if series[0] == FULL else faster_from(line, of_full.get((batch, FULL))),
            over_fused="" if series[0] in (FULL, FUSED) else faster_from(line, of_full.get((batch, FUSED))),
        )
        for key, line in lines.items()
        for batch, series in [key]
    ]


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole


def _kv_bandwidth(rows: Sequence[SpeedRow]) -> float | None:
    nbytes = [row.kv_bytes for row in rows]
    if max(nbytes) == min(nbytes):
        return None
    ms_per_byte = linear_regression(nbytes, [row.tpot_ms for row in rows]).slope
    # A cache of one size holds but a few bytes more, whose time drowns in everything else.
    grows = max(nbytes) > 1.5 * min(nbytes)
    return 1000.0 / ms_per_byte if grows and ms_per_byte > 0 else None


def faster_from(mine: Line, other: Line | None) -> str:
    """From which context on ``mine`` is below ``other``, in words; empty where there is no other."""
    if other is None:
        return ""
    ahead, gains = other.intercept - mine.intercept, other.slope - mine.slope
    if gains <= 0:
        if ahead <= 0:
            return "never"
        return "all" if gains == 0 else f"up to {ahead / -gains:,.0f}"
    return "all" if ahead >= 0 else f"from {-ahead / gains:,.0f}"
