"""The level of each row's own interval at which those of all rows of a table hold together.

Methods fail on the same documents, and rows that move together need hardly more adjusting than one row does (Westfall &
Young 1993; balanced as by Beran 1988): the level is read off the joint distribution of the rows' p-values under no
difference, and lies between that of independent rows (Sidak) and that of one row.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import special

from bench.judge.exact import mid_p_of_none
from bench.judge.resampling import NUMBERS_AT_ONCE, RESAMPLES, Array
from bench.judge.verdict import ALPHA

ALL_FLIPS = 12
"""Up to so many documents every choice of signs is counted, 4,096 at most; of more, as many as there are resamples."""
JUST_ABOVE = 1.0 + 1e-6
"""P-values of counts lie on a lattice: what equals the level is below it whatever the last digit is."""


class Joint(NamedTuple):
    """What a family is judged by."""

    level: float
    """Error that each row's own interval may have, so that the family's have ``alpha`` together."""
    smallest: Array
    """Smallest of the rows' own p-values under no difference, drawn many times, ascending."""
    alpha: float
    rows: float

    def adjusted(self, p_values: Array) -> Array:
        """P-values of rows, for the family; below ``alpha`` where those are below :attr:`level`. Ties count by half."""
        first, last = (np.searchsorted(self.smallest, p_values, side=side) for side in ("left", "right"))
        shares = (first + last) / 2 / len(self.smallest)
        independent = -np.expm1(self.rows * np.log1p(-np.minimum(p_values, 1.0 - 1e-15)))
        found = np.clip(shares, p_values, np.maximum(independent, p_values))
        below = p_values < self.level
        # Ties of resamples, and the steps between them, must not part the p-value from its interval.
        edge = self.alpha * (1.0 - 1e-6)
        return np.where(below, np.minimum(found, edge), np.maximum(found, self.alpha))


def independent_level(rows: float, alpha: float = ALPHA) -> float:
    """Error of each of so many independent intervals that together have ``alpha`` (Sidak)."""
    return -math.expm1(math.log1p(-alpha) / rows)


def quantile(ascending: Array, share: float) -> Array:
    """Of each row [rows, draws] of values in ascending order, as :func:`numpy.quantile` has it, which sorts again."""
    place = share * (ascending.shape[-1] - 1)
    below = math.floor(place)
    low, high = ascending[..., below], ascending[..., min(below + 1, ascending.shape[-1] - 1)]
    found: Array = low + (place - below) * (high - low)
    return found


def joint(p_values: Array, alpha: float = ALPHA) -> Joint:
    """The family's level, from the rows' own p-values under no difference [rows, draws]."""
    smallest = np.sort(p_values.min(axis=0))
    return _between(float(quantile(smallest, alpha)), smallest, len(p_values), alpha)


def unrelated(rows: float, alpha: float = ALPHA) -> Joint:
    """The family of rows of which nothing says how they hang together: its level is that of independent ones."""
    return Joint(independent_level(rows, alpha), np.zeros(1), alpha, rows)


def _between(level: float, smallest: Array, rows: int, alpha: float) -> Joint:
    return Joint(min(max(level, independent_level(rows, alpha)), alpha), smallest, alpha, rows)


@lru_cache(maxsize=4)
def _normals(n: int, seed: int) -> Array:
    return np.random.default_rng([seed, n, 1]).normal(size=(n, RESAMPLES))


def _under_no_difference(changes: Array, seed: int) -> Array:
    """Sums of changes [rows, n] whose signs mean nothing: normal ones of the same covariance, [rows, draws]."""
    rows, n = changes.shape
    if n * RESAMPLES <= NUMBERS_AT_ONCE:
        drawn: Array = changes @ _normals(n, seed)
        return drawn
    # Of many documents a number for each would be gigabytes; the covariance of the rows says as much.
    variances, directions = np.linalg.eigh(changes @ changes.T)
    found: Array = (directions * np.sqrt(np.maximum(variances, 0.0))) @ _normals(rows, seed)
    return found


def of_normal(changes: Array, alpha: float = ALPHA, seed: int = 0) -> Joint:
    """The family of rows whose statistics are normal, with the correlation of their changes.

    Args:
        changes: 1 where only the method is right, -1 where only the baseline is, else 0, or the sum of these over the
            documents of each source: [rows, n].
    """
    lengths = np.sqrt((changes**2).sum(axis=1, keepdims=True))
    drawn = _under_no_difference(changes, seed)
    statistics = np.divide(drawn, lengths, out=np.zeros_like(drawn), where=lengths > 0)
    return joint(2 * special.ndtr(-np.abs(statistics)), alpha)


@lru_cache(maxsize=4)
def _signs(n: int, seed: int) -> Array:
    if n <= ALL_FLIPS:
        every: Array = (1 - 2 * ((np.arange(2**n) >> np.arange(n)[:, None]) & 1)).astype(np.float64)
        return every
    drawn: Array = np.random.default_rng([seed, n, 2]).choice([-1.0, 1.0], size=(n, RESAMPLES)).astype(np.float64)
    return drawn


def of_signs(changes: Array, alpha: float = ALPHA, seed: int = 0) -> Joint:
    """The family of rows of few documents, whose p-values are those of counts.

    Without a difference it is by chance who is right where a method and the baseline differ: the signs of the changes
    of each document are turned together, so that rows stay as alike as they are. Half of what ties with the level
    counts, which few counts would else keep far from ``alpha``.

    Args:
        changes: 1 where only the method is right, -1 where only the baseline is, else 0 [rows, n].
    """
    n = changes.shape[1]
    changed = np.abs(changes).sum(axis=1, keepdims=True).astype(int)
    rose = ((changed + changes @ _signs(n, seed)) / 2).astype(int)
    smallest = np.sort(mid_p_of_none(n)[rose, changed - rose].min(axis=0))
    values, ties = np.unique(smallest, return_counts=True)
    within = values[np.cumsum(ties) - ties / 2 <= alpha * len(smallest)]
    return _between(float(within[-1]) * JUST_ABOVE if len(within) else 0.0, smallest, len(changes), alpha)
