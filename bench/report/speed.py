"""The table of ``arkv-bench speed``: one group per context and budget, as many columns as fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.records.timing import SpeedRow


def _number(value: Callable[[SpeedRow], float | None], digits: int, scale: float = 1.0) -> Callable[[SpeedRow], str]:
    return lambda row: "" if (found := value(row)) is None else f"{found * scale:.{digits}f}"


COLUMNS: tuple[tuple[str, Callable[[SpeedRow], str]], ...] = (
    ("tokens", lambda row: str(row.context_length)),
    ("C", lambda row: str(row.cache_size or "")),
    ("method", lambda row: row.method),
    ("format", lambda row: row.quant_format or ""),
    ("TPOT ms", _number(lambda row: row.tpot_ms, 1)),
    ("vs full", _number(lambda row: row.vs_full, 2)),
    ("vs fused", _number(lambda row: row.vs_fused, 2)),
    ("vs ceil.", _number(lambda row: row.vs_ceiling, 2)),
    ("KV MB", _number(lambda row: row.kv_bytes, 2, 1e-6)),
    ("prefill s", _number(lambda row: row.prefill_s, 2)),
    ("prefill\n/ full", _number(lambda row: row.prefill_vs_full, 2)),
    ("compr. s", _number(lambda row: row.compress_s, 3)),
    ("min-max", lambda row: f"{row.tpot_min:.0f}-{row.tpot_max:.0f}"),
)
"""Header and cell, the least needed last."""

LEGEND = (
    "tokens: context; C: tokens per layer that the cache may hold. TPOT: time per output token, and its min-max.",
    "vs full, vs fused, vs ceil.: how many times faster than the stock full cache, than a full cache that the suite's "
    "own kernel reads (full-fused: nothing evicted or quantized), and than a stock cache of only C tokens. Columns "
    "without room are in speed.csv (--outdir).",
)
"""What the columns mean."""


def speed_table(rows: Sequence[SpeedRow], title: str, width: int) -> Table:
    """The rows of :func:`bench.records.timing.summarize` within ``width`` characters; the last columns go first."""
    console = Console(width=10_000)
    columns = list(COLUMNS)
    while (table := _table(rows, columns)) and console.measure(table).maximum > width and len(columns) > 5:
        columns.pop()
    table.title = Text(title, style="bold", overflow="fold")
    return table


def _table(rows: Sequence[SpeedRow], columns: Sequence[tuple[str, Callable[[SpeedRow], str]]]) -> Table:
    table = Table(title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for header, _ in columns:
        left = header in ("method", "format")
        table.add_column(
            header if "\n" in header else header.replace(" ", "\n"), justify="left" if left else "right", no_wrap=True
        )
    groups = [(row.context_length, row.cache_size or 0) for row in rows]
    # Stable: within a context the full cache first, then budget by budget.
    order = sorted(range(len(rows)), key=groups.__getitem__)
    for index, following in zip(order, [*order[1:], None], strict=True):
        cells = [cell(rows[index]) for _, cell in columns]
        ends = following is not None and groups[following] != groups[index]
        table.add_row(*cells, end_section=ends)
    return table
