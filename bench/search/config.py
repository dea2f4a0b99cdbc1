"""Everything that a search is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arkv import METHODS, CacheConfig
from bench.errors import UserError
from bench.judge import stats
from bench.methods.grid import grid
from bench.names import budget_text
from bench.search.parameters import DEFAULTS, PARAMETERS, idle
from bench.settings.run import RunConfig
from tasks.base import nearest

FIDELITY = "fidelity"
"""The task whose measure is the divergence from the full cache."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Everything that ``arkv-bench tune`` can be told."""

    run: RunConfig
    """Model, one method, budgets, tasks and their options; ``limit`` is the number of tuning documents of a task."""
    params: tuple[str, ...] | None = None
    n_trials: int = 30
    """Of the whole study, those of an earlier run included."""
    held_out: int = 16
    """Documents of each task that the report is about."""
    chunk: int | None = None
    """Tokens of a continuation that are read at once; None for all, 1 for decoding."""
    batch: int = 5
    """Trials that are drawn together where a task is answered by the engine."""
    keep_gib: float = 4.0
    """Memory for recorded prefills."""

    def __post_init__(self) -> None:
        for name, low in (("n_trials", 1), ("held_out", stats.LEAST_DOCUMENTS), ("batch", 1), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')}={value}: give {low} or more", exit_code=2)
        if not self.keep_gib >= 0:
            raise UserError(f"--keep-gib={self.keep_gib}: give 0 or more", exit_code=2)
        if len(self.run.quant_type) != 1 or self.run.quant_type[0] not in METHODS:
            given = ",".join(self.run.quant_type)
            raise UserError(f"--quant-type={given}: give one of {', '.join(METHODS)}", exit_code=2)
        for name, least in (("model", 1), ("window_size", 0)):
            if not least <= len(getattr(self.run, name)) <= 1:
                given = ",".join(map(str, getattr(self.run, name)))
                raise UserError(f"--{name.replace('_', '-')}={given}: a search has one", exit_code=2)
        for name in self.params or ():
            if name not in PARAMETERS:
                raise UserError(f"--params={name}: {nearest(name, PARAMETERS)}", exit_code=2)
            if reason := idle(name, self.base(0), self.params or (), self.decodes):
                raise UserError(f"--params={name} changes nothing here: {reason}", exit_code=2)
        if not self.searched:
            raise UserError("--params: nothing can be searched here; name some of them", exit_code=2)

    @property
    def method(self) -> str:
        """The method whose settings are searched."""
        return self.run.quant_type[0]

    @property
    def decodes(self) -> bool:
        """Whether anything is read in more than one forward behind its prompt."""
        return self.run.tasks != (FIDELITY,) or (self.chunk is not None and self.chunk < self.run.continuation)

    @property
    def searched(self) -> tuple[str, ...]:
        """The settings that are searched, the choices among them first: others may depend on them."""
        given = self.params or DEFAULTS[self.run.budget_unit]
        names = [name for name in given if idle(name, self.base(0), given, self.decodes) is None]
        return tuple(sorted(names, key=lambda name: not PARAMETERS[name].choices))

    def base(self, budget: int) -> CacheConfig:
        """The method's own settings at a budget of the list."""
        return self.config(budget, {})

    def config(self, budget: int, found: Mapping[str, Any]) -> CacheConfig:
        """The cache at a budget of the list with the settings that a trial has found.

        Raises:
            arkv.ConfigError: they make no sense together.
        """
        (cell,) = grid(
            [self.method],
            [self.run.budgets[budget]],
            [found["window_size"]] if "window_size" in found else self.run.window_size,
            self.run.quant_format,
            {**self.run.method_settings, **{name: value for name, value in found.items() if name != "window_size"}},
        )
        assert cell.cache_config is not None
        return cell.cache_config

    def configs(self, found: Mapping[str, Any]) -> list[CacheConfig]:
        """One cache for every budget."""
        return [self.config(budget, found) for budget in range(len(self.run.budgets))]

    @property
    def recorded_queries(self) -> int:
        """Newest queries of a prompt that any trial takes scores from."""
        base = self.base(0)
        widest = [int(PARAMETERS[name].high) for name in ("window_size", "query_span") if name in self.searched]
        # A trial may choose the importance that the method's own span belongs to.
        return max([base.window_size, base.query_span or 0, *widest])

    def budget_text(self, budget: int) -> str:
        """A budget of the list for a person."""
        settings = {"cache_size": None, "cache_ratio": None, **self.run.budgets[budget]}
        return budget_text(self.run.budget_unit, **settings)
