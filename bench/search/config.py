"""Everything that a search is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arkv import METHODS, CacheConfig
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.methods.grid import OwnMethod, grid, own_cell, tristate_cell
from bench.methods.names import library_of
from bench.methods.prompt import Asked
from bench.names import FULL, budget_text
from bench.search.parameters import DEFAULTS, PARAMETERS, Parameter, declared, idle
from bench.settings.tune import TuneSettings
from tasks.errors import nearest

FIDELITY = "fidelity"
"""The task whose measure is the divergence from the full cache."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What ``arkv-bench tune`` was told, and what follows from it: the settings searched, the caches of a trial."""

    run: TuneSettings
    """As given; ``limit`` is the number of tuning documents of a task."""
    own: Mapping[str, OwnMethod] = field(default_factory=dict)
    """Methods of plugins by name."""

    def __post_init__(self) -> None:
        given = ",".join(self.run.method_names)
        tunable = [*METHODS, *(name for name, own in self.own.items() if own.method.settings_space)]
        if len(self.run.methods) != 1 or self.method not in tunable:
            why = "a search has one" if len(self.run.methods) != 1 else self._why_not(tunable)
            raise UserError(f"--methods={given}: {why}; give one of {', '.join(tunable)}", exit_code=2)
        for name, least in (("model", 1), ("window_size", 0)):
            if not least <= len(getattr(self.run, name)) <= 1:
                given = ",".join(map(str, getattr(self.run, name)))
                raise UserError(f"--{name.replace('_', '-')}={given}: a search has one", exit_code=2)
        for name in self.run.params or ():
            if name not in self.space:
                raise UserError(f"--params={name}: {nearest(name, self.space)}", exit_code=2)
            if reason := self._idle(name, self.run.params or ()):
                raise UserError(f"--params={name} changes nothing here: {reason}", exit_code=2)
        if not self.searched:
            raise UserError("--params: nothing can be searched here; name some of them", exit_code=2)

    @property
    def method(self) -> str:
        """The method whose settings are searched."""
        return self.run.method_names[0]

    @property
    def decodes(self) -> bool:
        """Whether anything is read in more than one forward behind its prompt."""
        return self.run.tasks != (FIDELITY,) or (self.run.chunk is not None and self.run.chunk < self.run.continuation)

    @property
    def searched(self) -> tuple[str, ...]:
        """The settings that are searched, the choices among them first: others may depend on them."""
        given = self.run.params or (tuple(self.space) if self.method in self.own else DEFAULTS[self.run.budget_unit])
        names = [name for name in given if self._idle(name, given) is None]
        return tuple(sorted(names, key=lambda name: not self.space[name].choices))

    @property
    def space(self) -> dict[str, Parameter]:
        """What can be searched, and within which range."""
        if self.method not in self.own:
            return PARAMETERS
        return declared(self.method, self.own[self.method].method.settings_space)

    def own_value(self, name: str) -> Any:
        """What the method has for a setting by itself."""
        return getattr(self.own[self.method].method if self.method in self.own else self.base(0), name)

    def _idle(self, name: str, searched: Sequence[str]) -> str | None:
        return None if self.method in self.own else idle(name, self.base(0), searched, self.decodes)

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

    def cells(self, found: Mapping[str, Any]) -> list[Cell]:
        """One cell for every budget, with the settings that a trial has found.

        Raises:
            arkv.ConfigError, UserError: they make no sense together.
        """
        if self.method in self.own:
            asked = [Asked(self.run.budget_unit, **budget) for budget in self.run.budgets]
            return [own_cell(self.method, self.method, self.own[self.method], found, item) for item in asked]
        return [tristate_cell(self.method, self.config(budget, found)) for budget in range(len(self.run.budgets))]

    @property
    def recorded_queries(self) -> int:
        """Newest queries of a prompt that any trial takes scores from."""
        if self.method in self.own:
            return self.own[self.method].method.queries
        base = self.base(0)
        widest = [int(PARAMETERS[name].high) for name in ("window_size", "query_span") if name in self.searched]
        # A trial may choose the importance that the method's own span belongs to.
        return max([base.window_size, base.query_span or 0, *widest])

    def budget_text(self, budget: int) -> str:
        """A budget of the list for a person."""
        settings = {"cache_size": None, "cache_ratio": None, **self.run.budgets[budget]}
        return budget_text(self.run.budget_unit, **settings)

    def _why_not(self, tunable: Sequence[str]) -> str:
        """Why the method cannot be tuned."""
        if self.method == FULL:
            return "the full cache has no settings"
        if self.method in self.own:
            return "it declares no settings_space (docs/plugins.md)"
        if (library := library_of(self.method)) is not None:
            return f"what is searched are settings of the tri-state cache, which methods of {library} do not have"
        return f"no method with settings that can be searched: {nearest(self.method, tunable)}"
