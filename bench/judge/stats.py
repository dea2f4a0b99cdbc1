"""How sure one number is: intervals over documents. Rows of a table are compared in :mod:`bench.judge.family`.

Every difference is paired: both methods answered the same documents. The interval that suits a score depends on it, and
each is here for the coverage it has at 20 to 100 documents:

- Scores of two values, such as 0 and 1 or 0 and 100: score intervals, Wilson's for one proportion and Tango's for the
  difference of two paired ones (Tango, Statistics in Medicine 1998). Any bootstrap fails here: when no resample can
  hold a document that differs, the interval has no width. With 20 documents of which 5 % change, percentile, BCa and
  studentized bootstrap contain the truth in 74 % of the runs.
- Any other score: the studentized bootstrap over documents (bootstrap-t; Efron & Tibshirani, chapter 12). On skewed
  scores and n = 20, percentile and BCa intervals contain the truth in 85-91 % of the runs, the studentized one in
  92-96 %.
- Divergences, which are above 0: the same on the log scale, so that no interval reaches 0.

An interval beyond the range of a score is cut there: what cannot be is not what the interval covers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.judge.resampling import Array, bootstrap_t, log_ratios
from bench.judge.tails import normal_end, student_end
from bench.judge.verdict import ALPHA
from bench.names import LEAST_DOCUMENTS

EXACT_RANKS = 50
"""Up to so many values the distribution of their ranks is counted; above it is normal."""


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float


UNBOUNDED = (-math.inf, math.inf)
NORMAL = normal_end(ALPHA / 2)
"""Standard errors to both ends of a 95 % interval of a normal estimate."""


def ends(bounds: tuple[float, float]) -> tuple[float, float]:
    """The two values of a binary score: the ends of its range, 0 and 1 where it has none."""
    return bounds if math.isfinite(bounds[1] - bounds[0]) else (0.0, 1.0)


def is_binary(*scores: Sequence[float], bounds: tuple[float, float] = UNBOUNDED) -> bool:
    """Whether every score is one of the two ends of its range."""
    low, high = ends(bounds)
    arrays = (np.asarray(group, dtype=float) for group in scores)
    return all(bool(((array == low) | (array == high)).all()) for array in arrays)


def finite(scores: Sequence[float]) -> Array:
    """The scores of n documents [n]. Raises :class:`ValueError` for none, and for any that is no number, by place."""
    array = np.asarray(scores, dtype=float)
    unknown = np.flatnonzero(~np.isfinite(array))
    if len(unknown):
        places = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"{len(unknown)} of {len(array)} scores are no numbers: those of documents {places}")
    if not len(array):
        raise ValueError("there are no scores")
    return array


# --- Documents that are not independent ---


def by_source(values: Array, sources: Sequence[object] | None) -> tuple[Array, Array]:
    """Sums over the documents of each source, and how many these are.

    Args:
        values: one per document, [..., n].
        sources: what each document is made of, [n]; documents of one source, such as questions on one text, rise and
            fall together, so that it is sources that are drawn. None is a source of its own for each.

    Returns:
        Sums [..., g] and numbers of documents [g] of g sources.
    """
    if sources is None:
        return values, np.ones(values.shape[-1])
    places = {source: place for place, source in enumerate(dict.fromkeys(sources))}
    if len(places) == values.shape[-1]:
        return values, np.ones(values.shape[-1])
    of = np.zeros((values.shape[-1], len(places)))
    of[np.arange(values.shape[-1]), [places[source] for source in sources]] = 1.0
    return values @ of, of.sum(axis=0)


def design_effect(values: Array, sources: Sequence[object] | None) -> Array:
    """How many times the variance of the mean of independent documents that of these is, at least 1 (Rao & Scott,
    Biometrics 1992): so many times fewer independent ones would say as much.

    Args:
        values: one per document, [..., n].
    """
    sums, sizes = by_source(values, sources)
    n, groups = values.shape[-1], sums.shape[-1]
    if groups == n or groups < 2:
        return np.ones(values.shape[:-1])
    mean = values.mean(axis=-1, keepdims=True)
    together = groups / (groups - 1) * ((sums - mean * sizes) ** 2).sum(axis=-1)
    alone = n / (n - 1) * ((values - mean) ** 2).sum(axis=-1)
    ratio = np.divide(together, alone, out=np.ones_like(together), where=alone > 0)
    found: Array = np.maximum(ratio, 1.0)
    return found


# --- Intervals ---


def mean_interval(
    scores: Sequence[float],
    *,
    binary: bool | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
    logarithm: bool = False,
    sources: Sequence[object] | None = None,
    seed: int = 0,
) -> Interval | None:
    """95 % interval of the mean score of n documents, or None where they do not say.

    Args:
        binary: whether every score is one of the two ends of its range by its nature; None is what these are.
        bounds: between which every score lies.
        logarithm: of a score above 0, such as a divergence: on the log scale.
        sources: of the documents, see :func:`by_source`.
        seed: of the resamples.
    """
    array = finite(scores)
    sums, sizes = by_source(array, sources)
    if len(sizes) < LEAST_DOCUMENTS:
        return None
    if is_binary(scores, bounds=bounds) if binary is None else binary:
        low, high = ends(bounds)
        shares = (array - low) / (high - low)
        found = wilson(
            float(shares.mean()), len(array) / float(design_effect(shares, sources)), normal(len(sizes), len(array))
        )
        return Interval(low + (high - low) * found.low, low + (high - low) * found.high)
    if logarithm:
        return _log_interval(sums, sizes, seed)
    return _bootstrap_interval(sums, sizes, bounds, seed)


def normal(sources: int, documents: int, alpha: float = ALPHA) -> float:
    """Standard errors to both ends of an interval of proportions: those of Student's t where the scatter is taken from
    the sources."""
    return normal_end(alpha / 2) if sources == documents else student_end(alpha / 2, sources - 1)


def wilson(share: float, n: float, critical: float = NORMAL) -> Interval:
    """Wilson's score interval of a proportion of ``n`` documents, which need not be a whole number."""
    spread = critical * math.sqrt(share * (1.0 - share) / n + critical**2 / (4 * n**2))
    middle, whole = share + critical**2 / (2 * n), 1.0 + critical**2 / n
    low = 0.0 if share == 0 else (middle - spread) / whole
    return Interval(low, 1.0 if share == 1 else (middle + spread) / whole)


def _log_interval(sums: Array, sizes: Array, seed: int) -> Interval | None:
    if np.ptp(sums / sizes) == 0 or sums.min() < 0:
        return None
    resampled = log_ratios(sums[None], sizes, seed)
    high, low = np.quantile(resampled.studentized[0], [1.0 - ALPHA / 2, ALPHA / 2])
    centre, error = resampled.estimate[0], resampled.error[0]
    return Interval(math.exp(centre - high * error), math.exp(centre - low * error))


def difference_interval(
    scores: Sequence[float],
    baseline: Sequence[float],
    *,
    binary: bool | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
    seed: int = 0,
) -> Interval | None:
    """95 % interval of the mean paired difference, ``scores`` minus ``baseline``, or None where they do not say.

    Args:
        scores: of a method.
        baseline: of another one, on the same documents.
        binary: whether every score is one of the two ends of its range by its nature; None is what these are.
        bounds: between which every score of either lies.
        seed: of the resamples.
    """
    if len(scores) < LEAST_DOCUMENTS:
        return None
    differences = paired(scores, baseline)
    if is_binary(scores, baseline, bounds=bounds) if binary is None else binary:
        low, high = paired_proportions((differences > 0).sum(), (differences < 0).sum(), len(differences))
        scale = ends(bounds)[1] - ends(bounds)[0]
        return Interval(scale * float(low), scale * float(high))
    width = bounds[1] - bounds[0]
    return _bootstrap_interval(differences, np.ones(len(differences)), (-width, width), seed)


def _bootstrap_interval(sums: Array, sizes: Array, bounds: tuple[float, float], seed: int) -> Interval | None:
    if np.ptp(sums / sizes) == 0:
        return None
    low, high = np.clip(bootstrap_t(sums, sizes, seed=seed), *bounds)
    return Interval(float(low), float(high))


def score_statistic(gained: Array, lost: Array, n: Any, difference: Array) -> tuple[Array, Array]:
    """How many standard errors ``(gained - lost) / n`` is above a true difference; and the share of lost documents that
    is likeliest at that difference (Tango). All arguments broadcast."""
    # Maximum likelihood of the share of lost documents, given the difference.
    linear = -gained - lost + (2 * n - gained + lost) * difference
    constant = -lost * difference * (1.0 - difference)
    share = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * share + difference * (1.0 - difference))
    statistic: Array = (gained - lost - n * difference) / np.sqrt(np.maximum(variance, np.finfo(float).tiny))
    return statistic, share


def paired_proportions(gained: Any, lost: Any, n: Any, critical: float = NORMAL) -> tuple[Array, Array]:
    """Tango's score interval of the difference of two paired proportions, ``(gained - lost) / n``.

    Args:
        gained: documents that only the method got right, any shape.
        lost: documents that only the baseline got right, same shape.
        n: number of documents, any shape that fits; none of the three need be whole.
        critical: standard errors that both ends are away.

    Returns:
        Low and high ends, same shape.
    """
    gained, lost = np.asarray(gained, dtype=float), np.asarray(lost, dtype=float)
    # Where the statistic, which falls with the difference, is ``critical`` and its negative: between an end of the
    # range and the mean.
    mean = (gained - lost) / n
    beyond, within = np.stack([np.full_like(mean, -1.0), np.full_like(mean, 1.0)]), np.stack([mean, mean])
    for _ in range(50):
        middle = (beyond + within) / 2
        outside = np.abs(score_statistic(gained, lost, n, middle)[0]) > critical
        beyond, within = np.where(outside, middle, beyond), np.where(outside, within, middle)
    return within[0], within[1]


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
        beyond = int(total / 2 + -normal_end(ALPHA / 2) * deviation)
    if not beyond:
        return estimate, None
    return estimate, Interval(float(means[beyond - 1]), float(means[total - beyond]))


# --- Adjusting ---


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of any false claim in the family stays below the level."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return [float(value) for value in adjusted]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values: the expected share of false claims stays below the level."""
    ranks = np.argsort(np.argsort(p_values, kind="stable"), kind="stable")
    raised = np.sort(p_values) * (len(p_values) / np.arange(1, len(p_values) + 1))
    # Of a smaller p-value none that is larger than a larger one's.
    lowest = np.minimum.accumulate(raised[::-1])[::-1]
    return [float(value) for value in np.clip(lowest, 0, 1)[ranks]]


def paired(scores: Sequence[float], baseline: Sequence[float]) -> Array:
    """Differences of the scores of two methods on the same documents [n]. Raises :class:`ValueError`."""
    if len(scores) != len(baseline) or not len(scores):
        raise ValueError(f"paired scores of the same documents are needed, not {len(scores)} and {len(baseline)}")
    return finite(scores) - finite(baseline)
