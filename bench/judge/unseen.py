"""Rows of which few documents change: how much one may that was not among them.

No resample holds a change that no document had. So half a document is added that changed by as much as can be, down for
the low end and up for the high one, and shares of all are drawn from a Dirichlet distribution (the Bayesian bootstrap;
Rubin, Annals of Statistics 1981). Where every change is as large as can be, these are Jeffreys' intervals of a
proportion, which hold in 95 % on average over truths; with a whole document they would be Clopper and Pearson's, which
hold in no less for any (Learned-Miller & Thomas, arXiv 1905.06208).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bench.judge.resampling import RESAMPLES, Array

UNSEEN = 0.5
"""Documents, or sources of them, that changed by as much as can be."""


@lru_cache(maxsize=4)
def _weights(n: int, seed: int) -> tuple[Array, Array]:
    generator = np.random.default_rng([seed, n, 3])
    return generator.exponential(size=(n, RESAMPLES)), generator.gamma(UNSEEN, size=RESAMPLES)


def unseen_changes(
    sums: Array, sizes: Array, largest: float, level: float, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Intervals and p-values of the mean change of rows that are judged one by one.

    Args:
        sums: of the changes of the documents of each source [rows, g].
        sizes: how many documents these are [g].
        largest: change that a document can have, up or down.
        level: error of each interval.

    Returns:
        Low ends, high ends and two-sided p-values [rows]; below ``level`` if and only if the interval lies on one side
        of 0.
    """
    seen, unseen = _weights(len(sizes), seed)
    reach = largest * unseen * sizes.mean()
    total = sizes @ seen + unseen * sizes.mean()
    changed = sums @ seen
    lowest, highest = (changed - reach) / total, (changed + reach) / total
    low, high = np.quantile(lowest, level / 2, axis=1), np.quantile(highest, 1.0 - level / 2, axis=1)
    p_values = np.minimum(2 * np.minimum((lowest <= 0).mean(axis=1), (highest >= 0).mean(axis=1)), 1.0)
    outside = (low > 0) | (high < 0)
    p_values = np.where(outside, np.minimum(p_values, level * (1.0 - 1e-6)), np.maximum(p_values, level))
    return low, high, p_values
