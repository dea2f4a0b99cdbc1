"""The rows of a table against one of them: intervals and p-values that hold for all of them together.

The more rows a table has, the likelier it is that one of them differs by luck. So the differences of all rows to their
baseline are a family, whose 95 % intervals contain *all* the true differences in 95 % of the tables. Interval and
p-value come from one statistic with one critical value: an interval contains 0 if and only if the adjusted p is 0.05 or
more, which is what "not distinguishable" says.

The level of a row's interval follows from how the rows hang together. Methods fail on the same documents, and rows that
move together need hardly more adjusting than one row does (Westfall & Young 1993; balanced as by Beran 1988): it is
read off the joint distribution of the statistics over all rows, and lies between that of independent rows (Sidak) and
that of one row.

- Scores of two values: the score statistic of paired proportions (at 0 the one of McNemar's test, without correction),
  with Tango's interval; its joint distribution is the normal one with the rows' correlation.
- Other scores: the studentized bootstrap over documents, drawn for all rows together. Each end is that of Student's t
  where this lies further out: with fewer than about 20 documents the bootstrap's own ends are too near.
- Divergences: the same, of the logarithm of the ratio of two means.

Coverage and power are simulated in tests/bench/judge/test_family.py. Below 20 documents, scores of two values cannot
have exactly 95 %, since so few counts are possible: their intervals cover more. Of strongly skewed scores, or such
as are mostly 0, on so few documents they cover less, the more rows the less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

from bench.judge.power import McNemar
from bench.judge.stats import (
    RESAMPLES,
    UNBOUNDED,
    Array,
    Interval,
    Resampled,
    ends,
    finite,
    is_binary,
    log_ratios,
    means,
    paired,
    paired_proportions,
)
from bench.judge.verdict import ALPHA, POWER
from bench.names import LEAST_DOCUMENTS


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against another one on the same documents, as one of a family."""

    n: int
    difference: float
    """Mean of the paired differences, method minus baseline; of logarithms, the ratio of the two means."""
    interval: Interval | None = None
    """Holds together with those of the family; None where the documents say nothing: too few, or all alike."""
    p_value: float | None = None
    """Two-sided, of this comparison alone."""
    p_adjusted: float | None = None
    """Of the family: below 0.05 if and only if the interval lies on one side of no difference."""
    detectable: float | None = None
    """Smallest true difference, in the direction of the one found, that this test with n such documents finds with a
    power of 80 %; None where unknown, as of few documents with skewed scores, or where there is none."""


MANY_DOCUMENTS = 30
SKEWED = 0.75
"""Fewer documents whose changes have a greater skewness do not say how long their tails are: where a power of 80 % was
claimed from them, simulations found 67 to 91 %."""


class Joint(NamedTuple):
    """What a family is judged by."""

    level: float
    """Error that each row's own interval may have, so that the family's have ``alpha`` together."""
    smallest: Array
    """Smallest of the rows' own p-values under no difference, drawn many times, ascending."""
    alpha: float
    rows: int

    def adjusted(self, p_values: Array) -> Array:
        """P-values of rows, for the family; below ``alpha`` where those are below :attr:`level`."""
        shares = np.searchsorted(self.smallest, p_values, side="right") / len(self.smallest)
        independent = -np.expm1(self.rows * np.log1p(-np.minimum(p_values, 1.0 - 1e-15)))
        found = np.clip(shares, p_values, np.maximum(independent, p_values))
        below = p_values < self.level
        # Ties of resamples, and the steps between them, must not part the p-value from its interval.
        edge = self.alpha * (1.0 - 1e-6)
        return np.where(below, np.minimum(found, edge), np.maximum(found, self.alpha))


def independent_level(rows: int, alpha: float = ALPHA) -> float:
    """Error of each of so many independent intervals that together have ``alpha`` (Sidak)."""
    return -math.expm1(math.log1p(-alpha) / rows)


def joint(p_values: Array, alpha: float = ALPHA) -> Joint:
    """The family's level, from the rows' own p-values under no difference [rows, draws]."""
    smallest = np.sort(p_values.min(axis=0))
    rows = len(p_values)
    level = float(np.clip(np.quantile(smallest, alpha), independent_level(rows, alpha), alpha))
    return Joint(level, smallest, alpha, rows)


@lru_cache(maxsize=4)
def _normals(n: int, seed: int) -> Array:
    return np.random.default_rng([seed, n, 1]).normal(size=(n, RESAMPLES))


def binary_joint(changes: Array, alpha: float = ALPHA, seed: int = 0) -> Joint:
    """The family of rows of scores of two values.

    Args:
        changes: 1 where only the method is right, -1 where only the baseline is, else 0: [rows, n].
    """
    lengths = np.sqrt((changes**2).sum(axis=1, keepdims=True))
    drawn = changes @ _normals(changes.shape[1], seed)
    statistics = np.divide(drawn, lengths, out=np.zeros_like(drawn), where=lengths > 0)
    return joint(2 * stats.norm.sf(np.abs(statistics)), alpha)


class Judged(NamedTuple):
    """Rows judged by resamples."""

    low: Array
    high: Array
    p_values: Array
    joint: Joint
    upper: Array
    """Critical values of the estimate over its standard error, above and below."""
    lower: Array


def judge(resampled: Resampled, n: int, alpha: float = ALPHA) -> Judged:
    """Intervals and p-values of rows [rows] from resamples of n documents that all rows share."""
    drawn = np.sort(resampled.studentized, axis=1)
    draws = drawn.shape[1]
    # The rank of each value among those of its row; equal ones share the greatest.
    rows = zip(drawn, resampled.studentized, strict=True)
    ranks = np.stack([np.searchsorted(row, values, "right") for row, values in rows])
    shares = ranks / (draws + 1)
    family = joint(np.minimum(2 * np.minimum(shares, 1.0 - shares), 1.0), alpha)
    student = float(stats.t.isf(family.level / 2, n - 1))
    upper = np.maximum(np.quantile(drawn, 1.0 - family.level / 2, axis=1), student)
    lower = np.minimum(np.quantile(drawn, family.level / 2, axis=1), -student)
    observed = resampled.estimate / resampled.error
    beyond = np.stack([np.searchsorted(row, value) for row, value in zip(drawn, observed, strict=True)])
    own = 2 * np.minimum(beyond + 1, draws - beyond + 1) / (draws + 1)
    p_values = np.clip(np.maximum(own, 2 * stats.t.sf(np.abs(observed), n - 1)), 0.0, 1.0)
    outside = (observed > upper) | (observed < lower)
    edge = family.level * (1.0 - 1e-6)
    p_values = np.where(outside, np.minimum(p_values, edge), np.maximum(p_values, family.level))
    low = resampled.estimate - upper * resampled.error
    high = resampled.estimate - lower * resampled.error
    return Judged(low, high, p_values, family, upper, lower)


def detectable_means(resampled: Resampled, judged: Judged, n: int) -> Array:
    """Smallest shifts of the mean [rows] that 80 % of the resamples would show, in the direction of the one found.

    A resample of documents that are shifted by d is found where ``studentized + d / its error`` is beyond the critical
    value. The widening is that of Student's t over a normal: critical values and errors of other documents scatter.
    """
    distance = np.where(
        resampled.estimate[:, None] < 0,
        (resampled.studentized - judged.lower[:, None]) * resampled.errors,
        (judged.upper[:, None] - resampled.studentized) * resampled.errors,
    )
    return np.quantile(distance, POWER, axis=1) * math.sqrt((n - 1) / (n - 3))


def compare_all(
    scores: Sequence[Sequence[float]],
    baseline: Sequence[float],
    *,
    binary: bool | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
    logarithm: bool = False,
    alpha: float = ALPHA,
    seed: int = 0,
) -> list[Comparison]:
    """Every method against the baseline, on the same documents.

    Args:
        scores: of each method, one per document.
        baseline: on the same documents.
        binary: whether every score is one of the two ends of its range; None is what these are.
        bounds: between which every score lies.
        logarithm: compare by the ratio of the means, on the log scale; for scores above 0.
        alpha: error that the family may have; less than 0.05 where it is a part of a larger one.
        seed: of the resamples.

    Raises:
        ValueError: not the same number of documents, none, or a score that is no number.
    """
    if not scores:
        return []
    changes = np.stack([paired(own, baseline) for own in scores])
    n = changes.shape[1]
    part = ALPHA / alpha
    if is_binary(*scores, baseline, bounds=bounds) if binary is None else binary:
        found = _compare_binary(changes, ends(bounds)[1] - ends(bounds)[0], alpha, seed)
    elif logarithm:
        found = _compare_ratios(np.stack([finite(own) for own in scores]), finite(baseline), alpha, seed)
    else:
        found = _compare_means(changes, bounds[1] - bounds[0], alpha, seed)
    if n < LEAST_DOCUMENTS:
        return [Comparison(n=n, difference=item.difference) for item in found]
    return [_of_larger(item, part) for item in found]


def compare(
    scores: Sequence[float],
    baseline: Sequence[float],
    *,
    comparisons: int = 1,
    bounds: tuple[float, float] = UNBOUNDED,
    seed: int = 0,
) -> Comparison:
    """One method against another, as one of so many ``comparisons`` whose documents differ. See :func:`compare_all`."""
    return compare_all([scores], baseline, bounds=bounds, alpha=ALPHA / comparisons, seed=seed)[0]


def _of_larger(found: Comparison, part: float) -> Comparison:
    """The p-value of a family that has but a part of the error."""
    if found.p_adjusted is None or part == 1:
        return found
    p_adjusted = min(found.p_adjusted * part, 1.0)
    return Comparison(**{**vars(found), "p_adjusted": p_adjusted})


def _compare_binary(changes: Array, scale: float, alpha: float, seed: int) -> list[Comparison]:
    units = np.sign(changes)
    n = units.shape[1]
    family = binary_joint(units, alpha, seed)
    critical = float(stats.norm.isf(family.level / 2))
    gained, lost = (units > 0).sum(axis=1), (units < 0).sum(axis=1)
    low, high = paired_proportions(gained, lost, n, critical)
    statistics = (gained - lost) / np.sqrt(np.maximum(gained + lost, 1))
    p_values = 2 * stats.norm.sf(np.abs(statistics))
    adjusted = family.adjusted(p_values)
    test = McNemar(n, critical)
    return [
        Comparison(
            n=n,
            difference=scale * float(gained[row] - lost[row]) / n,
            interval=Interval(scale * float(low[row]), scale * float(high[row])),
            p_value=float(p_values[row]),
            p_adjusted=float(adjusted[row]),
            detectable=_scaled(test.detectable(float(gained[row] + lost[row]) / n), scale),
        )
        for row in range(len(units))
    ]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _compare_means(changes: Array, width: float, alpha: float, seed: int) -> list[Comparison]:
    n = changes.shape[1]
    # Where all documents changed alike, nothing is known of how they scatter.
    known = np.flatnonzero(np.ptp(changes, axis=1) > 0) if n >= LEAST_DOCUMENTS else np.array([], dtype=int)
    found = []
    for row in changes:
        nothing = 1.0 if not row.any() else None
        found.append(Comparison(n=n, difference=float(row.mean()), p_value=nothing, p_adjusted=nothing))
    if not len(known):
        return found
    resampled = means(changes[known], seed=seed)
    judged = judge(resampled, n, alpha)
    adjusted = judged.joint.adjusted(judged.p_values)
    detectable = detectable_means(resampled, judged, n)
    is_said = (n >= MANY_DOCUMENTS) | (np.abs(stats.skew(changes[known], axis=1)) <= SKEWED)
    for place, row in enumerate(known):
        low, high = np.clip([judged.low[place], judged.high[place]], -width, width)
        found[row] = Comparison(
            n=n,
            difference=found[row].difference,
            interval=Interval(float(low), float(high)),
            p_value=float(judged.p_values[place]),
            p_adjusted=float(adjusted[place]),
            detectable=float(detectable[place]) if is_said[place] and detectable[place] < width else None,
        )
    return found


def _compare_ratios(values: Array, baseline: Array, alpha: float, seed: int) -> list[Comparison]:
    n = values.shape[1]
    sums = values.sum(axis=1)
    if not baseline.any():
        # Nothing is a multiple of 0.
        return [Comparison(n=n, difference=1.0 if not total else math.inf) for total in sums]
    found = [Comparison(n=n, difference=float(total / baseline.sum())) for total in sums]
    if n < LEAST_DOCUMENTS:
        return found
    # Where a method is the same multiple in all documents, nothing is known of how it scatters.
    below = baseline / baseline.mean()
    known = [row for row, mine in enumerate(values) if mine.any() and not np.allclose(mine / mine.mean(), below)]
    if not known:
        return found
    judged = judge(log_ratios(values[known], baseline, seed), n, alpha)
    adjusted = judged.joint.adjusted(judged.p_values)
    for place, row in enumerate(known):
        found[row] = Comparison(
            n=n,
            difference=found[row].difference,
            interval=Interval(math.exp(judged.low[place]), math.exp(judged.high[place])),
            p_value=float(judged.p_values[place]),
            p_adjusted=float(adjusted[place]),
        )
    return found
