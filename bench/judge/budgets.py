"""Which rows had the same budget, and so may be compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.records.row import Row


def by_budget(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one task and metric in groups that had the same budget, in the order of first appearance.

    ``full`` is a group of its own, and so is a method of one size, which has no budget. Methods without a window join
    the others, and so do those with one of their own, unless the run compares windows of one method.
    """
    windows: dict[str, set[int]] = {}
    for row in rows:
        if row.window_size is not None:
            windows.setdefault(row.method, set()).add(row.window_size)
    compared = any(len(mine) > 1 for mine in windows.values())
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        window = row.window_size if compared else None
        has_budget = (row.cache_size, row.cache_ratio) != (None, None)
        key = (row.budget_unit, row.cache_size, row.cache_ratio, window) if has_budget else (row.cell,)
        groups.setdefault(key, []).append(row)
    return list(groups.values())
