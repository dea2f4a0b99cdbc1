"""Few paired answers, right and wrong, counted out: mid-p values and intervals of the difference of two proportions.

Of few documents a score statistic is not normal: at most 45 outcomes of 8 documents are possible. Their chances are
those of a trinomial distribution (won, lost, neither), at the share of lost documents that is likeliest where the
difference is as supposed (Storer & Kim, JASA 1990). Half of the chance of what was found counts (mid-p; Lancaster, JASA
1961): an interval then holds in 95 % on average over truths, where one that holds in no less for any truth holds
in far more for most (Agresti & Coull, The American Statistician 1998).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import special

from bench.judge.resampling import Array
from bench.judge.stats import score_statistic

MOST_COUNTED = 30
"""Documents up to which outcomes are counted, 496 of them; of more, the score statistic is as good as normal."""
TIE = 1e-9
BISECTIONS = 24
"""Ends are exact to 1e-7."""


@lru_cache(maxsize=MOST_COUNTED)
def _outcomes(n: int) -> tuple[Array, Array, Array]:
    """Documents gained and lost in every outcome of n of them, and the logarithm of in how many orders it comes."""
    gained, lost = np.divmod(np.arange((n + 1) ** 2), n + 1)
    possible = gained + lost <= n
    counts = np.stack([gained, lost, n - gained - lost])[:, possible].astype(float)
    return counts[0], counts[1], special.gammaln(n + 1) - special.gammaln(counts + 1).sum(axis=0)


def mid_p(n: int, gained: Array, lost: Array, difference: Array) -> Array:
    """Two-sided mid-p of a true difference: twice the smaller chance of an outcome that is further to one side.

    Args:
        n: number of documents.
        gained: documents that only the method got right [rows].
        lost: documents that only the baseline got right [rows].
        difference: supposed for each row [rows].
    """
    all_gained, all_lost, orders = _outcomes(n)
    observed, share = score_statistic(gained, lost, n, difference)
    share = np.clip(share, np.maximum(-difference, 0.0), np.minimum((1.0 - difference) / 2, 1.0))
    statistics, _ = score_statistic(all_gained, all_lost, n, difference[:, None])
    won = np.clip(share + difference, 0.0, 1.0)
    neither = np.clip(1.0 - won - share, 0.0, 1.0)
    chances = np.exp(
        orders
        + special.xlogy(all_gained, won[:, None])
        + special.xlogy(all_lost, share[:, None])
        + special.xlogy(n - all_gained - all_lost, neither[:, None])
    )
    further = statistics - observed[:, None]
    ties = (chances * (np.abs(further) <= TIE)).sum(axis=1) / 2
    above = (chances * (further > TIE)).sum(axis=1) + ties
    below = (chances * (further < -TIE)).sum(axis=1) + ties
    return np.minimum(2 * np.minimum(above, below), 1.0)


def mid_p_interval(n: int, gained: Array, lost: Array, level: float) -> tuple[Array, Array]:
    """The differences [rows] whose :func:`mid_p` is not below ``level``: low and high ends. They hold 0 if and only if
    it is one of these."""
    counts, places = np.unique([gained, lost], axis=1, return_inverse=True)
    low, high = _mid_p_interval(n, counts[0], counts[1], level)
    return low[places], high[places]


def _mid_p_interval(n: int, gained: Array, lost: Array, level: float) -> tuple[Array, Array]:
    mean = (gained - lost) / n
    holds_none = mid_p(n, gained, lost, np.zeros_like(mean)) >= level
    ends = []
    for end in (-1.0, 1.0):
        # Between the mean, which is always within, and the end of the range. Where 0 lies between them, its p says on
        # which side of it the interval ends.
        passes_none = end * mean < 0
        within = np.where(passes_none & holds_none, 0.0, mean)
        beyond = np.where(passes_none & ~holds_none, 0.0, end)
        for _ in range(BISECTIONS):
            middle = (beyond + within) / 2
            outside = mid_p(n, gained, lost, middle) < level
            beyond, within = np.where(outside, middle, beyond), np.where(outside, within, middle)
        ends.append(within)
    return ends[0], ends[1]


@lru_cache(maxsize=MOST_COUNTED)
def mid_p_of_none(n: int) -> Array:
    """:func:`mid_p` of no difference, by how many documents rose and how many fell [n + 1, n + 1]; 1 for impossible
    ones."""
    gained, lost, _ = _outcomes(n)
    found = np.ones((n + 1, n + 1))
    found[gained.astype(int), lost.astype(int)] = mid_p(n, gained, lost, np.zeros(len(gained)))
    return found
