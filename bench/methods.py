"""The grid of a run: which cache methods, at which budget and with which settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arkv import FORMATS, METHODS, CacheConfig
from bench.errors import UserError
from tasks.base import nearest

FULL = "full"

DESCRIPTIONS = {
    FULL: "everything at model precision, a stock transformers cache: the baseline",
    "window": "attention sinks and the newest tokens within the budget (StreamingLLM)",
    "origin": "heavy hitters and the window, all at model precision: eviction only",
    "quant": "heavy hitters quantized, the window at model precision",
    "mix": "ARKV: Original and Quantized by each layer's OQ ratio, the rest evicted",
}


@dataclass(frozen=True)
class Cell:
    """One method with all its settings: a row of the table, a cell of the grid."""

    method: str
    config: CacheConfig | None = None
    """None for the stock full cache."""

    @property
    def quantizes(self) -> bool:
        """Whether any token can become Quantized."""
        return self.config is not None and self.config.original_share != 1.0

    @property
    def quant_format(self) -> str | None:
        """Number format of Quantized tokens, None where nothing is quantized."""
        return self.config.quant_format if self.config is not None and self.quantizes else None

    @property
    def budget_unit(self) -> str | None:
        """What the budget counts."""
        return None if self.config is None else "tokens"

    @property
    def cache_size(self) -> int | None:
        """C, tokens per layer."""
        return None if self.config is None else self.config.cache_size

    @property
    def window_size(self) -> int | None:
        """W, newest tokens that are always Original."""
        return None if self.config is None else self.config.window_size

    @property
    def key(self) -> str:
        """Short and unique for the settings; equal settings have equal keys across runs."""
        if self.config is None:
            return self.method
        settings = json.dumps(asdict(self.config), sort_keys=True)
        parts = [self.method, f"C{self.config.cache_size}", f"W{self.config.window_size}", self.quant_format or ""]
        return "-".join(part for part in parts if part) + "-" + hashlib.sha256(settings.encode()).hexdigest()[:8]

    @property
    def label(self) -> str:
        """For a person: the method, its budget and format."""
        if self.config is None:
            return self.method
        return f"{self.method} C={self.config.cache_size}" + (f" {self.quant_format}" if self.quant_format else "")


def check_names(methods: Iterable[str], formats: Iterable[str]) -> None:
    """Raises :class:`UserError` (exit code 2) for the first unknown method or format, naming the nearest known one."""
    for method in methods:
        if method != FULL and method not in METHODS:
            raise UserError(f"unknown method {method!r}: {nearest(method, [FULL, *METHODS])}", exit_code=2)
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown quant format {name!r}: {nearest(name, FORMATS)}", exit_code=2)


def grid(
    methods: Sequence[str],
    cache_sizes: Sequence[int],
    window_sizes: Sequence[int],
    formats: Sequence[str],
    settings: dict[str, Any],
) -> list[Cell]:
    """All cells in the order asked for, without the combinations that would be the same cache twice.

    Raises:
        UserError: unknown method or format.
        arkv.ConfigError: settings that make no sense together.
    """
    check_names(methods, formats)
    cells: dict[str, Cell] = {}
    for method in methods:
        if method == FULL:
            cells[FULL] = Cell(FULL)
            continue
        quantizes = METHODS[method].get("original_share") != 1.0
        for cache_size in cache_sizes:
            for window_size in window_sizes:
                for quant_format in formats if quantizes else formats[:1]:
                    config = CacheConfig.for_method(
                        method, cache_size=cache_size, window_size=window_size, quant_format=quant_format, **settings
                    )
                    cell = Cell(method, config)
                    cells[cell.key] = cell
    return list(cells.values())
