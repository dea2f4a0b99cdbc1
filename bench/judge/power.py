"""What so many documents can show: the power of the tests that tables are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special, stats

from bench.judge.verdict import ALPHA, POWER
from bench.names import LEAST_DOCUMENTS

WORTH_FINDING = 0.5
"""A loss of half of the answers: documents that cannot show even that of any row tell a table's rows apart by luck."""
MOST_DOCUMENTS = 1000
"""Up to so many documents are looked through for a number that suffices."""


@dataclass(frozen=True)
class McNemar:
    """The test of paired scores of two values on n documents, as one row of a family.

    A difference is found where ``|gained - lost| / sqrt(gained + lost)`` is above ``critical``.
    """

    n: int
    critical: float

    def power(self, difference: float, changed: float) -> float:
        """Chance of finding a difference.

        Args:
            difference: true difference of the two proportions, above 0.
            changed: true share of documents on which the two differ, at least ``difference``.
        """
        counts = np.arange(self.n + 1)
        # The most documents on the rarer side with which so many changed ones are found; -1 where none are.
        limit = np.ceil((counts - self.critical * np.sqrt(counts)) / 2) - 1
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


@lru_cache(maxsize=4096)
def _detectable(test: McNemar, changed: float) -> float | None:
    if test.n < LEAST_DOCUMENTS or test.power(1.0, 1.0) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        enough = test.power(middle, max(changed, middle)) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def of_rows(n: int, rows: int) -> McNemar:
    """The test before anything is measured: so many rows that have nothing in common, the worst case."""
    return McNemar(n, float(stats.norm.isf(-math.expm1(math.log1p(-ALPHA) / rows) / 2)))


def documents_needed(rows: int, difference: float = WORTH_FINDING) -> int | None:
    """Documents with which each of so many rows that loses so much is told from its baseline in 4 of 5 cases."""
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
