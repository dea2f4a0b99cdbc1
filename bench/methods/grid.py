"""The grid of a run: which cache methods, at which budget and with which settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from arkv import FORMATS, METHODS, CacheConfig
from bench.errors import UserError
from bench.methods import peers
from bench.names import FULL, budget_text
from tasks.base import nearest


@dataclass(frozen=True)
class Cell:
    """One method with all its settings: a row of the table, a cell of the grid."""

    method: str
    config: CacheConfig | None = None
    """Settings of the tri-state cache; None for the stock full cache and for methods of others."""
    peer: peers.Peer | None = None
    """A method of others, or None."""

    @property
    def quantizes(self) -> bool:
        """Whether any token can become Quantized."""
        if self.peer is not None:
            return self.peer.quant_format is not None
        return self.config is not None and self.config.original_share != 1.0

    @property
    def quant_format(self) -> str | None:
        """Number format of Quantized tokens, None where nothing is quantized."""
        if self.peer is not None:
            return self.peer.quant_format
        return self.config.quant_format if self.config is not None and self.quantizes else None

    @property
    def budget_unit(self) -> str | None:
        """What the budget counts."""
        settings = self.config or self.peer
        return None if settings is None else settings.budget_unit

    @property
    def cache_size(self) -> int | None:
        """C, tokens per layer, or their worth in bytes; None where the budget is a share of each prompt."""
        settings = self.config or self.peer
        return None if settings is None else settings.cache_size

    @property
    def cache_ratio(self) -> float | None:
        """The budget as a share of each prompt, or None."""
        settings = self.config or self.peer
        return None if settings is None else settings.cache_ratio

    @property
    def budget(self) -> str:
        """The budget for a person."""
        return budget_text(self.budget_unit, self.cache_size, self.cache_ratio)

    @property
    def window_size(self) -> int | None:
        """W, newest tokens that are always Original."""
        return None if self.config is None else self.config.window_size

    @property
    def recorded_queries(self) -> int:
        """Newest queries of a prompt that the method looks at."""
        if self.peer is not None and self.peer.method is not None:
            return self.peer.method.queries
        return 1 if self.config is None else self.config.recorded_queries

    @property
    def key(self) -> str:
        """Short and unique for the settings; equal settings have equal keys across runs."""
        found = self.config or self.peer
        if found is None:
            return self.method
        named = {field.name: getattr(found, field.name) for field in fields(found) if field.compare}
        settings = json.dumps(named, sort_keys=True)
        parts = [self.method]
        if found.budget_unit is not None:
            size = f"R{self.cache_ratio:g}" if self.cache_ratio is not None else f"C{self.cache_size}"
            parts.append(size + found.budget_unit[0])
        if self.config is not None:
            parts += [f"W{self.window_size}", self.quant_format or ""]
        return "-".join(part for part in parts if part) + "-" + hashlib.sha256(settings.encode()).hexdigest()[:8]

    @property
    def label(self) -> str:
        """For a person: the method, its budget and format."""
        quant_format = self.quant_format if self.config is not None else None
        return " ".join(part for part in (self.method, self.budget, quant_format) if part)


def is_known(method: str) -> bool:
    """Whether ``method`` is one of this suite or asks for a library's."""
    return method == FULL or method in METHODS or peers.is_peer(method)


def check_names(methods: Iterable[str], formats: Iterable[str], own: Iterable[str] = ()) -> None:
    """Raises :class:`UserError` (exit code 2) for the first unknown method or format, naming the nearest known one.

    ``own`` are methods of the user's own.
    """
    known = [FULL, *METHODS, *own]
    for method in methods:
        if not is_known(method) and method not in known:
            raise UserError(f"unknown method {method!r}: {nearest(method, known)}", exit_code=2)
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown quant format {name!r}: {nearest(name, FORMATS)}", exit_code=2)


def grid(
    methods: Sequence[str],
    budgets: Sequence[Mapping[str, Any]],
    window_sizes: Sequence[int],
    formats: Sequence[str] | None,
    settings: Mapping[str, Any],
    own: Mapping[str, peers.OwnMethod] | None = None,
) -> list[Cell]:
    """All cells in the order asked for, without the combinations that would be the same cache twice.

    Args:
        budgets: ``cache_size`` or ``cache_ratio`` of each budget.
        window_sizes: none take each method's own.
        formats: formats of Quantized tokens; None takes each method's own.
        settings: further settings of the cache, the same for all.
        own: methods of the user's own by name.

    Raises:
        UserError: unknown method or format, or a method of others that is not installed.
        arkv.ConfigError: settings that make no sense together.
    """
    own = {} if own is None else own
    check_names(methods, formats or (), own)
    cells: dict[str, Cell] = {}
    for method in methods:
        if method == FULL:
            cells[FULL] = Cell(FULL)
            continue
        if not is_known(method) or peers.is_peer(method):
            unit = settings.get("budget_unit", "tokens")
            for budget in budgets:
                given = {"budget_unit": unit, **budget}
                peer = own[method].peer(**given) if method in own else peers.make_peer(method, **given)
                cell = Cell(method, peer=peer)
                cells[cell.key] = cell
            continue
        quantizes = METHODS[method].get("original_share") != 1.0
        # What makes the method is not open to settings.
        mine = {name: value for name, value in settings.items() if name not in METHODS[method]}
        for budget in budgets:
            for window_size in window_sizes or (None,):
                for quant_format in formats if formats and quantizes else (None,):
                    chosen = {"window_size": window_size, "quant_format": quant_format}
                    given = {name: value for name, value in chosen.items() if value is not None}
                    config = CacheConfig.for_method(method, **budget, **given, **mine)
                    cell = Cell(method, config)
                    cells[cell.key] = cell
    return list(cells.values())
