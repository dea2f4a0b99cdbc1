"""What can be searched: settings of a method, and their ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arkv import CacheConfig
from bench.errors import UserError

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """The range of one setting of :class:`~arkv.CacheConfig`, or of a method of the user's own."""

    low: float = 0.0
    high: float = 0.0
    step: int | None = None
    """Of whole numbers."""
    log: bool = False
    choices: tuple[str, ...] = ()
    """In the place of a range."""

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """A value for the trial."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        if self.step is not None:
            return trial.suggest_int(name, int(self.low), int(self.high), step=self.step)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether the search can come to ``value``."""
        if self.choices or self.step is None:
            return value in self.choices if self.choices else self.low <= value <= self.high
        return value in range(int(self.low), int(self.high) + 1, self.step)


PARAMETERS: dict[str, Parameter] = {
    "tau1": Parameter(low=0.1, high=10.0),
    "tau2": Parameter(low=0.1, high=10.0),
    "tau3": Parameter(low=0.1, high=10.0),
    "gamma": Parameter(low=0.0, high=400.0),
    "window_size": Parameter(low=8, high=128, step=8),
    "original_share": Parameter(low=0.0, high=0.3),
    "importance": Parameter(choices=("mean_var", "mean_max")),
    "query_span": Parameter(low=32, high=256, step=32),
    "pool_width": Parameter(low=1, high=15, step=2),
    "max_pool_width": Parameter(low=1, high=31, step=2),
    "decode_rate": Parameter(low=1 / 256, high=1 / 4, log=True),
}
"""What can be searched, and within which range."""


def declared(method: str, space: Mapping[str, tuple[Any, ...]]) -> dict[str, Parameter]:
    """The ``settings_space`` of a user's own method. Raises :class:`UserError` for what is no range and no choice."""
    return {name: _declared(method, name, values) for name, values in space.items()}


def _declared(method: str, name: str, values: Any) -> Parameter:
    match values:
        case (int(low), int(high), *step) if low < high and (not step or (len(step) == 1 and type(step[0]) is int)):
            return Parameter(low=low, high=high, step=step[0] if step else 1)
        case (int() | float() as low, int() | float() as high) if low < high:
            return Parameter(low=low, high=high)
        case (int() | float() as low, int() | float() as high, "log") if 0 < low < high:
            return Parameter(low=low, high=high, log=True)
        case (str(), _, *_) if all(isinstance(value, str) for value in values):
            return Parameter(choices=values)
    raise UserError(
        f"{method}: settings_space[{name!r}] is {values!r}: give (low, high), (low, high, step) of whole numbers, "
        '(low, high, "log") or a tuple of texts'
    )


OF_MEAN_MAX = ("query_span", "max_pool_width")
"""Settings of the importance ``mean_max`` only."""
DEFAULTS = {
    "tokens": ("tau1", "tau2", "tau3", "gamma"),
    "bytes": ("tau1", "tau2", "tau3", "window_size", "original_share", "query_span", "pool_width", "max_pool_width"),
}
"""By budget unit: what is searched unless it is said. In tokens those of the published search."""


def idle(name: str, base: CacheConfig, searched: Sequence[str], decodes: bool) -> str | None:
    """Why setting ``name`` changes nothing in a search; None where it does.

    Args:
        base: the method's own settings.
        searched: all settings of the search.
        decodes: answers are decoded token by token, not read in one chunk.
    """
    if name in ("tau1", "tau2", "tau3") and not base.uses_oq:
        return "the method has no OQ score"
    if name not in ("tau1", "tau2", "tau3", "window_size") and base.ranking == "recency":
        return "the method ranks tokens by age"
    if name == "original_share" and (base.original_share is None or base.original_share in (0.0, 1.0)):
        return "the method or its OQ ratios say what stays Original"
    if name in ("gamma", *OF_MEAN_MAX) and "importance" not in searched:
        wanted = "mean_var" if name == "gamma" else "mean_max"
        return None if base.importance == wanted else f"importance is {base.importance}"
    if name == "decode_rate" and base.decode_importance == "latest":
        return "every decoding step replaces the scores in budgets of tokens"
    if name == "decode_rate" and not decodes:
        return "the continuation is read in one chunk: give a smaller --chunk"
    return None
