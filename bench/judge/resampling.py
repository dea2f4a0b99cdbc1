"""What documents drawn again say of an estimate: the studentized bootstrap (bootstrap-t; Efron & Tibshirani, chapter
12) of means, and of the logarithms of ratios of them.

Letters: ``n`` documents, ``g`` sources, ``m`` rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.judge.verdict import ALPHA

Array = NDArray[np.float64]

RESAMPLES = 4999
NUMBERS_AT_ONCE = 4_000_000
"""Of resamples and documents, 32 MB: all resamples of 800 documents."""
DECIMALS = 9
"""Of statistics that are compared with each other: what is equal is so whatever the last digits are, in which
processors differ. Few documents have many equal resamples, and whether these tie decides a level."""
STANDARD_ERROR_FLOOR = 0.1
"""Share of the sample's standard error below which no resample's is taken to lie. Where few documents differ, some
resamples hold none of them, and without a floor the interval would be infinite."""


@lru_cache(maxsize=4)
def _resamples(n: int, count: int, seed: int) -> NDArray[np.uint8]:
    """How often each document is drawn in each resample: [count, n]. Of 20,000 documents it is 100 MB."""
    rng = np.random.default_rng([seed, n])
    drawn = np.empty((count, n), dtype=np.uint8)
    for start in range(0, count, _at_once(n)):
        # Once on average, and never 256 times.
        few = drawn[start : start + _at_once(n)]
        few[:] = rng.multinomial(n, np.full(n, 1.0 / n), size=len(few))
    return drawn


def _at_once(n: int) -> int:
    """Resamples of n documents that are held as numbers of 8 bytes at a time."""
    return max(NUMBERS_AT_ONCE // n, 1)


def _shares(n: int, count: int, seed: int) -> Iterator[Array]:
    """:func:`_resamples` as shares, some of them at a time."""
    drawn = _resamples(n, count, seed)
    for start in range(0, count, _at_once(n)):
        yield drawn[start : start + _at_once(n)] / n


def bootstrap_t(
    values: Array, sizes: Array | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Array, Array]:
    """Studentized bootstrap interval of the mean over the last axis.

    Args:
        values: one value per document, or the sum over those of each source, [..., n].
        sizes: documents of each source [n].
        resamples: draws of n of them with replacement, the same for all leading axes.
        seed: of the draws.

    Returns:
        Low and high ends, [...].
    """
    resampled = means(values, sizes, resamples, seed)
    tails = np.quantile(resampled.studentized, [1.0 - ALPHA / 2, ALPHA / 2], axis=-1)
    return resampled.estimate - tails[0] * resampled.error, resampled.estimate - tails[1] * resampled.error


class Resampled(NamedTuple):
    """Estimates [...], and what resamples of the documents say of their distribution [..., resamples]."""

    estimate: Array
    error: Array
    """Standard error."""
    studentized: Array
    """Of each resample: its distance from the estimate, over its own standard error."""
    errors: Array
    """Standard error of each resample."""


def means(sums: Array, sizes: Array | None = None, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Means over all documents; all leading axes see the same resamples.

    Args:
        sums: over the documents of each source, [..., g].
        sizes: how many these are [g]; None is one each.
    """
    groups = sums.shape[-1]
    sizes = np.ones(groups) if sizes is None else sizes
    mean = sums.sum(axis=-1, keepdims=True) / sizes.sum()
    centred = sums - mean * sizes
    shifts, variances = [], []
    for shares in _shares(groups, resamples, seed):
        drawn = shares @ sizes
        shift = (centred @ shares.T) / drawn
        # Squared distances of the sources' sums from those that the resample's own mean gives.
        # Sources of one size need no product of their own.
        weighed = sizes[0] * drawn * shift if np.ptp(sizes) == 0 else (centred * sizes) @ shares.T
        squares = (centred**2) @ shares.T - 2 * shift * weighed + shift**2 * (shares @ sizes**2)
        shifts.append(shift)
        variances.append(np.maximum(squares, 0.0) / (groups - 1) / drawn**2)
    error = np.sqrt((centred**2).sum(axis=-1) / (groups - 1) * groups) / sizes.sum()
    return _resampled(mean[..., 0], error, np.concatenate(shifts, axis=-1), np.concatenate(variances, axis=-1))


def log_ratios(values: Array, below: Array, seed: int = 0) -> Resampled:
    """Logarithms of the means of ``values`` [m, n] over those of ``below``, [n] or [m, n]: one for each document, or
    the sum over those of each source. Over numbers of documents they are those of the means of the values alone.

    The standard error is that of the first-order change of the logarithm, ``values / mean - below / mean``.
    """
    n = values.shape[-1]
    mean, mean_below = values.mean(axis=-1), below.mean(axis=-1)
    # A resample may hold nothing but zeros: it is as far off as can be.
    tiny = np.finfo(float).tiny
    estimate = np.log(mean / mean_below)
    shifts, variances = [], []
    for shares in _shares(n, RESAMPLES, seed):
        drawn, drawn_below = np.maximum(values @ shares.T, tiny), np.maximum(below @ shares.T, tiny)
        shifts.append(np.log(drawn / drawn_below) - estimate[:, None])
        squares = (values**2) @ shares.T / drawn**2 + (below**2) @ shares.T / drawn_below**2
        squares -= 2 * ((values * below) @ shares.T) / (drawn * drawn_below)
        variances.append(np.maximum(squares, 0.0) / (n - 1))
    error = (values / mean[:, None] - below / mean_below[..., None]).std(axis=-1, ddof=1) / math.sqrt(n)
    return _resampled(estimate, error, np.concatenate(shifts, axis=-1), np.concatenate(variances, axis=-1))


def _resampled(estimate: Array, error: Array, shift: Array, variance: Array) -> Resampled:
    errors = np.maximum(np.sqrt(variance), STANDARD_ERROR_FLOOR * error[..., None])
    studentized = np.divide(shift, errors, out=np.zeros_like(shift), where=errors > 0)
    return Resampled(estimate, error, studentized.round(DECIMALS), errors)
