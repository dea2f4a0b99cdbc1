"""How sure a score is: intervals over documents, paired comparisons with the full cache, and what n documents can show.

Every comparison is paired: both methods answered the same documents. The interval that suits a score depends on it, and
each is here for the coverage it has at 20 to 100 documents:

- Scores of 0 and 1: score intervals, Wilson's for one proportion and Tango's for the difference of two paired ones
  (Tango, Statistics in Medicine 1998). Any bootstrap fails here: when no resample can hold a document that differs, the
  interval has no width. With 20 documents of which 5 % change, percentile, BCa and studentized bootstrap contain the
  truth in 74 % of the runs.
- Any other score: the studentized bootstrap over documents (bootstrap-t; Efron & Tibshirani, chapter 12). On skewed
  scores and n = 20, percentile and BCa intervals contain the truth in 85-91 % of the runs, the studentized one in
  92-96 %.

An interval beyond the range of a score is cut there: what cannot be is not what the interval covers.

P-values are exact McNemar for scores of 0 and 1, and the sign-flip permutation test of the mean difference otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bench.judge.verdict import ALPHA, LEVEL
from bench.names import LEAST_DOCUMENTS

Array = NDArray[np.float64]

POWER = 0.8
"""Chance of being found that the smallest detectable difference has."""
RESAMPLES = 4999
EXACT_RANKS = 50
"""Up to so many values the distribution of their ranks is counted; above it is normal."""
STANDARD_ERROR_FLOOR = 0.1
"""Share of the sample's standard error below which no resample's is taken to lie. Where few documents differ, some
resamples hold none of them, and without a floor the interval would be infinite."""


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float


UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against another one on the same documents."""

    n: int
    difference: float
    """Mean of the paired differences, method minus baseline."""
    interval: Interval | None
    """None where the documents say nothing about it: too few, or all with the same difference."""
    p_value: float | None
    """Two-sided, not adjusted; None for fewer than two documents."""
    detectable: float | None
    """Smallest true difference that n such documents would have shown with a power of 80 %; None where unknown."""


def is_binary(*scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return all(value in (0.0, 1.0) for group in scores for value in group)


# --- Intervals ---


def mean_interval(
    scores: Sequence[float], *, binary: bool | None = None, bounds: tuple[float, float] = UNBOUNDED, seed: int = 0
) -> Interval | None:
    """95 % interval of the mean score of n documents, or None where they do not say.

    Args:
        binary: whether every score is 0 or 1 by its nature; None is what these are.
        bounds: between which every score lies.
        seed: of the resamples.
    """
    if len(scores) < LEAST_DOCUMENTS:
        return None
    if is_binary(scores) if binary is None else binary:
        found = stats.binomtest(int(sum(scores)), len(scores)).proportion_ci(LEVEL, method="wilson")
        return Interval(float(found.low), float(found.high))
    return _bootstrap_interval(np.asarray(scores, dtype=float), bounds, seed)


def difference_interval(
    scores: Sequence[float], baseline: Sequence[float], *, bounds: tuple[float, float] = UNBOUNDED, seed: int = 0
) -> Interval | None:
    """95 % interval of the mean paired difference, ``scores`` minus ``baseline``, or None where they do not say.

    Args:
        scores: of a method.
        baseline: of another one, on the same documents.
        bounds: between which every score of either lies.
        seed: of the resamples.
    """
    if len(scores) < LEAST_DOCUMENTS:
        return None
    differences = _paired(scores, baseline)
    if is_binary(scores, baseline):
        low, high = paired_proportions((differences > 0).sum(), (differences < 0).sum(), len(differences))
        return Interval(float(low), float(high))
    width = bounds[1] - bounds[0]
    return _bootstrap_interval(differences, (-width, width), seed)


def _bootstrap_interval(values: Array, bounds: tuple[float, float], seed: int) -> Interval | None:
    if np.ptp(values) == 0:
        return None
    low, high = np.clip(bootstrap_t(values, seed=seed), *bounds)
    return Interval(float(low), float(high))


@lru_cache(maxsize=4)
def _resamples(n: int, count: int, seed: int) -> Array:
    """How often each document is drawn in each resample, as shares: [count, n]."""
    drawn = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1.0 / n), size=count)
    return drawn / n


def bootstrap_t(values: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Array, Array]:
    """Studentized bootstrap interval of the mean over the last axis.

    Args:
        values: one value per document, [..., n].
        resamples: draws of n documents with replacement, the same for all leading axes.
        seed: of the draws.

    Returns:
        Low and high ends, [...].
    """
    n = values.shape[-1]
    shares = _resamples(n, resamples, seed)
    mean = values.mean(axis=-1, keepdims=True)
    centred = values - mean
    shift = centred @ shares.T
    variance = np.maximum((centred**2) @ shares.T - shift**2, 0.0) / (n - 1)
    error = values.std(axis=-1, ddof=1, keepdims=True) / math.sqrt(n)
    floored = np.maximum(np.sqrt(variance), STANDARD_ERROR_FLOOR * error)
    studentized = np.divide(shift, floored, out=np.zeros_like(shift), where=floored > 0)
    tails = np.quantile(studentized, [1.0 - ALPHA / 2, ALPHA / 2], axis=-1)
    low, high = mean[..., 0] - tails * error[..., 0]
    return low, high


def paired_proportions(gained: Any, lost: Any, n: int) -> tuple[Array, Array]:
    """Tango's score interval of the difference of two paired proportions, ``(gained - lost) / n``.

    Args:
        gained: documents that only the method got right, any shape.
        lost: documents that only the baseline got right, same shape.
        n: number of documents.

    Returns:
        Low and high ends, same shape.
    """
    gained, lost = np.asarray(gained, dtype=float), np.asarray(lost, dtype=float)
    critical = stats.norm.ppf(1.0 - ALPHA / 2)

    def statistic(difference: Array) -> Array:
        # Maximum likelihood of the share of lost documents, given the difference.
        linear = -gained - lost + (2 * n - gained + lost) * difference
        constant = -lost * difference * (1.0 - difference)
        share = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * share + difference * (1.0 - difference))
        return (gained - lost - n * difference) / np.sqrt(np.maximum(variance, np.finfo(float).tiny))

    def solve(outer: float, target: float) -> Array:
        """Where the statistic, which falls with the difference, crosses ``target``, between ``outer`` and the mean."""
        beyond, within = np.full_like(gained, outer), (gained - lost) / n
        for _ in range(50):
            middle = (beyond + within) / 2
            outside = np.abs(statistic(middle)) > abs(target)
            beyond, within = np.where(outside, middle, beyond), np.where(outside, within, middle)
        return within

    return solve(-1.0, critical), solve(1.0, -critical)


def pseudomedian(values: Sequence[float]) -> tuple[float, Interval | None]:
    """The Hodges-Lehmann estimate of where ``values`` lie, and its 95 % interval, None for fewer than six of them.

    For quantities that are now and then far off, as times are: a stall of the machine moves a mean, and widens its
    interval until nothing can be told; up to a quarter of the values can be anything without moving this one far. It is
    the median of the means of all pairs, its interval the changes that Wilcoxon's signed-rank test does not reject
    (Hollander & Wolfe, Nonparametric Statistical Methods, chapter 3).
    """
    array = np.asarray(values, dtype=float)
    n = len(array)
    first, second = np.triu_indices(n)
    means = np.sort((array[first] + array[second]) / 2)
    estimate = float(np.median(means))
    total = len(means)
    if n <= EXACT_RANKS:
        chances = np.ones(1)
        for rank in range(1, n + 1):
            chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
        beyond = int((np.cumsum(chances) <= ALPHA / 2).sum())
    else:
        deviation = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        beyond = int(total / 2 + stats.norm.ppf(ALPHA / 2) * deviation)
    if not beyond:
        return estimate, None
    return estimate, Interval(float(means[beyond - 1]), float(means[total - beyond]))


# --- Tests ---


def p_value(scores: Sequence[float], baseline: Sequence[float], *, seed: int = 0) -> float | None:
    """Two-sided p of no difference on the same documents; None for fewer than two.

    Scores of 0 and 1: exact McNemar. Others: every sign of the differences flipped in every way (up to 13 documents) or
    in 9,999 random ways.
    """
    differences = _paired(scores, baseline)
    if len(differences) < 2:
        return None
    different = differences[differences != 0]
    if not len(different):
        return 1.0
    if is_binary(scores, baseline):
        return float(stats.binomtest(int((different > 0).sum()), len(different)).pvalue)
    if len(different) == 1:
        return 1.0
    result = stats.permutation_test(
        (different,),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of any false claim in the family stays below the level."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return [float(value) for value in adjusted]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values: the expected share of false claims stays below the level."""
    return [float(value) for value in stats.false_discovery_control(p_values)] if len(p_values) else []


# --- Power ---


def detectable_difference(scores: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Smallest true difference that so many such documents would have shown, unadjusted, with a power of 80 %.

    Scores of 0 and 1: from exact McNemar and the share of documents that changed. Others: from the standard deviation
    of the paired differences. None where that is unknown, or where no difference at all could have been shown.
    """
    differences = _paired(scores, baseline)
    n = len(differences)
    if n < LEAST_DOCUMENTS:
        return None
    if is_binary(scores, baseline):
        return _detectable_by_mcnemar(n, float((differences != 0).mean()))
    deviation = float(differences.std(ddof=1))
    if deviation == 0:
        return None
    quantiles = stats.t.ppf([1.0 - ALPHA / 2, POWER], n - 1)
    return float(quantiles.sum()) * deviation / math.sqrt(n)


def mcnemar_power(n: int, difference: float, changed: float) -> float:
    """Power of the exact McNemar test.

    Args:
        n: documents.
        difference: true difference of the two proportions, above 0.
        changed: true share of documents on which the two differ, at least ``difference``.
    """
    counts = np.arange(n + 1)
    # The most discordant documents on the rarer side that still give p < alpha; -1 where none do.
    limit = stats.binom.ppf(ALPHA / 2, counts, 0.5)
    limit = np.where(stats.binom.cdf(limit, counts, 0.5) > ALPHA / 2, limit - 1, limit)
    favoured = min((changed + difference) / (2 * changed), 1.0)
    found = stats.binom.cdf(limit, counts, 1.0 - favoured) + stats.binom.cdf(limit, counts, favoured)
    return float((stats.binom.pmf(counts, n, changed) * found).sum())


def _detectable_by_mcnemar(n: int, changed: float) -> float | None:
    if mcnemar_power(n, 1.0, 1.0) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        enough = mcnemar_power(n, middle, max(changed, middle)) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


# --- Together ---


def compare(
    scores: Sequence[float], baseline: Sequence[float], *, bounds: tuple[float, float] = UNBOUNDED, seed: int = 0
) -> Comparison:
    """Everything about the paired difference ``scores`` minus ``baseline``; arguments as :func:`difference_interval`.

    Raises:
        ValueError: not the same number of documents, or none.
    """
    return Comparison(
        n=len(scores),
        difference=float(_paired(scores, baseline).mean()),
        interval=difference_interval(scores, baseline, bounds=bounds, seed=seed),
        p_value=p_value(scores, baseline, seed=seed),
        detectable=detectable_difference(scores, baseline),
    )


def _paired(scores: Sequence[float], baseline: Sequence[float]) -> Array:
    if len(scores) != len(baseline) or not len(scores):
        raise ValueError(f"paired scores of the same documents are needed, not {len(scores)} and {len(baseline)}")
    return np.asarray(scores, dtype=float) - np.asarray(baseline, dtype=float)
