"""What so many documents can show: the power of the tests that tables are judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy import special

from bench.judge.exact import MOST_COUNTED, mid_p_of_none
from bench.judge.joint import independent_level
from bench.judge.resampling import Array
from bench.judge.tails import normal_end
from bench.judge.verdict import POWER
from bench.names import LEAST_DOCUMENTS

WORTH_FINDING = 0.5
"""A loss of half of the answers: documents that cannot show even that of any row tell a table's rows apart by luck."""
MOST_DOCUMENTS = 1000
"""Up to so many documents are looked through for a number that suffices."""


class Paired(ABC):
    """A test of paired scores of two values, as one row of a family."""

    n: int
    """Documents."""

    @property
    @abstractmethod
    def most_on_rarer_side(self) -> Array:
        """By how many documents changed [n + 1]: the most of them on the rarer side with which a difference is found;
        -1 where none is."""

    def power(self, difference: float, changed: float) -> float:
        """Chance of finding a difference.

        Args:
            difference: true difference of the two proportions, above 0.
            changed: true share of documents on which the two differ, at least ``difference``.
        """
        counts = np.arange(self.n + 1)
        limit = self.most_on_rarer_side
        favoured = min((changed + difference) / (2 * changed), 1.0)
        is_found = limit >= 0
        within, of = limit[is_found], counts[is_found]
        # The functions behind scipy.stats.binom, which checks its arguments for longer than it counts.
        chances = special.bdtr(within, of, 1.0 - favoured) + special.bdtr(within, of, favoured)
        choices = special.gammaln(self.n + 1) - special.gammaln(of + 1) - special.gammaln(self.n - of + 1)
        so_many = np.exp(choices + special.xlogy(of, changed) + special.xlog1py(self.n - of, -changed))
        return float((so_many * chances).sum())

    def detectable(self, changed: float = 0.0) -> float | None:
        """Smallest difference that is found with a power of 80 %, where the two differ on at least a share ``changed``
        of the documents; None where no difference is."""
        return _detectable(self, changed)


@dataclass(frozen=True)
class McNemar(Paired):
    """A difference is found where ``|gained - lost| / sqrt(gained + lost)`` is above ``critical``."""

    n: int
    critical: float

    @cached_property
    def most_on_rarer_side(self) -> Array:
        counts = np.arange(self.n + 1)
        found: Array = np.ceil((counts - self.critical * np.sqrt(counts)) / 2) - 1
        return found


@dataclass(frozen=True)
class Counted(Paired):
    """A difference is found where the mid-p of none (:mod:`bench.judge.exact`) is below ``level``."""

    n: int
    level: float

    @cached_property
    def most_on_rarer_side(self) -> Array:
        p_values = mid_p_of_none(self.n)
        rarer = [p_values[np.arange(many // 2 + 1), many - np.arange(many // 2 + 1)] for many in range(self.n + 1)]
        # The first that is not found ends those that are.
        return np.array([np.argmin([*(row < self.level), False]) - 1 for row in rarer], dtype=float)


@lru_cache(maxsize=4096)
def _detectable(test: Paired, changed: float) -> float | None:
    if test.n < LEAST_DOCUMENTS or test.power(1.0, 1.0) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        enough = test.power(middle, max(changed, middle)) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def of_level(n: int, level: float) -> Paired:
    """The test of so many independent documents at a row's own level."""
    return Counted(n, level) if n <= MOST_COUNTED else McNemar(n, normal_end(level / 2))


def of_rows(n: int, rows: int) -> Paired:
    """The test before anything is measured: so many rows that have nothing in common, the worst case."""
    return of_level(n, independent_level(rows))


def documents_needed(rows: int, difference: float = WORTH_FINDING) -> int | None:
    """Documents with which each of so many rows that loses so much is told from its baseline with a power of 80 %."""
    low, high = LEAST_DOCUMENTS - 1, MOST_DOCUMENTS
    if of_rows(high, rows).power(difference, difference) < POWER:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = of_rows(middle, rows).power(difference, difference) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def too_few(n: int, rows: int) -> str:
    """Why a table of so many rows cannot decide anything, and how many documents could; empty where it can."""
    needed = documents_needed(rows) if rows else None
    if needed is None or n >= needed:
        return ""
    found = of_rows(n, rows).detectable()
    loss = "none, whatever they score" if found is None else f"only one that loses {100 * found:.0f} % of the answers"
    told = f"{rows} row{'s' if rows > 1 else ''} from full ({loss})"
    return f"{n} documents cannot tell {told}; {needed} could, where half of them is lost"
