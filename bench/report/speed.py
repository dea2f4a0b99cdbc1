"""The tables of ``arkv-bench speed``: a row per cell, context and batch, and a step's time over the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.judge.speed import Growth, SpeedRow
from bench.records.files.numbers import bytes_text, milliseconds_text, seconds_text


def _number(value: Callable[[Any], float | None], digits: int, scale: float = 1.0) -> Callable[[Any], str]:
    return lambda row: "" if (found := value(row)) is None else f"{found * scale:.{digits}f}"


def _method(row: SpeedRow) -> str:
    return f"{row.method} (1 by 1)" if row.one_by_one else row.method


Columns = Sequence[tuple[str, Callable[[Any], str]]]

COLUMNS: Columns = (
    ("tokens", lambda row: str(row.context_length)),
    ("KV mem.", lambda row: bytes_text(row.kv_memory)),
    ("batch", lambda row: str(row.batch_size)),
    ("budget", lambda row: row.budget),
    ("method", _method),
    ("format", lambda row: row.quant_format or ""),
    ("TPOT ms", lambda row: milliseconds_text(row.tpot_ms)),
    ("tokens /s", _number(lambda row: row.decode_tokens_per_s, 1)),
    ("vs full", _number(lambda row: row.vs_full, 2)),
    ("vs fused", _number(lambda row: row.vs_fused, 2)),
    ("vs ceil.", _number(lambda row: row.vs_ceiling, 2)),
    ("KV MB", _number(lambda row: row.kv_bytes, 2, 1e-6)),
    ("MBU %", _number(lambda row: row.bandwidth_share, 0, 100.0)),
    ("prefill s", _number(lambda row: row.prefill_s, 2)),
    ("prefill\n/ full", _number(lambda row: row.prefill_vs_full, 2)),
    ("compr. s", _number(lambda row: row.compress_s, 3)),
    ("TTFT s", lambda row: seconds_text(row.ttft_ms)),
    ("min-max", lambda row: f"{row.tpot_min:.0f}-{row.tpot_max:.0f}"),
    ("read MB", _number(lambda row: row.step_bytes, 0, 1e-6)),
    ("peak GB", _number(lambda row: row.peak_memory_bytes, 2, 1e-9)),
)
"""Header and cell, the least needed last."""
BATCHED = ("batch", "tokens /s")
"""Columns that say nothing where every batch is of one."""

LEGEND = (
    "tokens: context. budget: tokens per layer that the cache may hold, or a share of the context. batch: sequences "
    "side by side, copies of one prompt; (1 by 1): each has a forward of its own. KV mem.: the largest batch whose "
    "caches fit in it. TPOT: time per output token of each sequence, and its min-max; tokens/s: of all together.",
    "vs full, vs fused, vs ceil.: how many times more tokens/s than the stock full cache, than a full cache that the "
    "suite's own kernel reads (full-fused: nothing evicted or quantized), and than a stock cache of only C tokens, all "
    "at the same batch or memory. MBU: bytes that a step has to read (read MB: weights, once a forward, and KV), over "
    "its time and the bandwidth of the memory, measured in the same run; a processor's own cache can make it more than "
    "100. Columns without room are in speed.csv (--outdir).",
)
"""What the columns mean."""

GROWTH_COLUMNS: Columns = (
    ("batch", lambda item: str(item.row.batch_size)),
    ("budget", lambda item: item.row.budget),
    ("method", lambda item: _method(item.row)),
    ("format", lambda item: item.row.quant_format or ""),
    ("ms at 0", _number(lambda item: item.intercept, 1)),
    ("ms per 1,000", _number(lambda item: item.slope, 2, 1000.0)),
    ("faster than full", lambda item: item.over_full),
    ("faster than fused", lambda item: item.over_fused),
    ("KV GB/s", _number(lambda item: item.kv_bandwidth, 1, 1e-9)),
    ("KV %", _number(lambda item: item.kv_bandwidth_share, 0, 100.0)),
)

GROWTH_LEGEND = (
    "A line by least squares through the medians of all contexts: ms of a step without a context, and more per 1,000 "
    "tokens of it. faster than: from which context on, by these lines, also beyond what was timed. KV GB/s: how fast "
    "the bytes are read that the cache holds more of behind longer contexts, with all that is done to them; KV %: of "
    "the bandwidth."
)


def shown(rows: Sequence[SpeedRow]) -> list[tuple[str, Callable[[Any], str]]]:
    """The columns that say something of these rows."""
    single = all(row.batch_size == 1 for row in rows)
    return [
        (header, cell)
        for header, cell in COLUMNS
        if not (single and header in BATCHED) and (header == "format" or any(map(cell, rows)))
    ]


def ordered(rows: Sequence[SpeedRow]) -> list[SpeedRow]:
    """By context, memory and batch; within these the full caches first, then budget by budget."""
    return sorted(rows, key=lambda row: (*_group(row), row.cache_size or 0, row.cache_ratio or 0.0))


def _group(row: SpeedRow) -> tuple[int, int, int]:
    # At a fixed memory each cell has a batch of its own.
    return row.context_length, row.kv_memory or 0, row.batch_size if row.kv_memory is None else 0


def speed_table(rows: Sequence[SpeedRow], title: str, width: int) -> Table:
    """The rows of :func:`bench.judge.speed.summarize` within ``width`` characters; the last columns go first."""
    rows = ordered(rows)
    groups = [(*_group(row), row.budget) for row in rows]
    ends = [place + 1 < len(rows) and groups[place + 1] != groups[place] for place in range(len(rows))]
    return _fitting(rows, ends, shown(rows), title, width)


def growth_table(items: Sequence[Growth], width: int) -> Table:
    """What :func:`bench.judge.speed.growths` found, within ``width`` characters."""
    items = sorted(items, key=lambda item: (item.row.batch_size, item.row.cache_size or 0, item.row.cache_ratio or 0.0))
    batches = [item.row.batch_size for item in items]
    ends = [place + 1 < len(items) and batches[place + 1] != batches[place] for place in range(len(items))]
    columns = [(header, cell) for header, cell in GROWTH_COLUMNS if header == "format" or any(map(cell, items))]
    return _fitting(items, ends, columns, "Time of a step over the context", width)


def _fitting(rows: Sequence[Any], ends: Sequence[bool], columns: Columns, title: str, width: int) -> Table:
    console = Console(width=10_000)
    columns = list(columns)
    while (table := _table(rows, ends, columns)) and console.measure(table).maximum > width and len(columns) > 5:
        columns.pop()
    table.title = Text(title, style="bold", overflow="fold")
    return table


def _table(rows: Sequence[Any], ends: Sequence[bool], columns: Columns) -> Table:
    table = Table(title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for header, _ in columns:
        left = header in ("method", "format")
        table.add_column(
            header if "\n" in header else header.replace(" ", "\n"), justify="left" if left else "right", no_wrap=True
        )
    for row, last in zip(rows, ends, strict=True):
        table.add_row(*(cell(row) for _, cell in columns), end_section=last)
    return table
