"""The rows of a table against one of them: intervals and p-values that hold for all of them together.

The more rows a table has, the likelier it is that one of them differs by luck. So the differences of all rows to their
baseline are a family, whose 95 % intervals contain *all* the true differences in 95 % of the tables. Interval and
p-value come from one statistic with one critical value: an interval contains 0 if and only if the adjusted p is 0.05 or
more, which is what "tied" says.

The level of a row's interval follows from how the rows hang together (:mod:`bench.judge.joint`).

- Scores of two values: mid-p of what was counted, of up to 30 independent documents; of others the score statistic of
  paired proportions, with Tango's interval (:mod:`bench.judge.proportions`).
- Other scores: the studentized bootstrap over documents, drawn for all rows together. Each end is that of Student's t
  where this lies further out. Fewer than 20 documents hardly show how long their tails are: where their changes lean to
  one side, rows count as independent ones, and more of them than they are; where not, Student's ends are taken.
- Such scores of which fewer than five documents change: how much a change is can hardly be known of so few, so that
  it is reckoned with one that was not seen (:mod:`bench.judge.unseen`).
- Divergences: as other scores, of the logarithm of the ratio of two means.

Coverage and power are simulated by scripts/coverage.py, and in tests/bench/judge/test_family.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from bench.judge.joint import Joint, joint, quantile, unrelated
from bench.judge.proportions import judge_proportions
from bench.judge.resampling import DECIMALS, Array, Resampled, log_ratios, means
from bench.judge.stats import UNBOUNDED, Interval, by_source, ends, is_binary, paired
from bench.judge.tails import skewness_of, student_end, student_tail
from bench.judge.unseen import unseen_changes
from bench.judge.verdict import ALPHA, POWER
from bench.names import LEAST_DOCUMENTS

Document = TypeVar("Document", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against another one on the same documents, as one of a family."""

    n: int
    """Documents."""
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


FEW_DOCUMENTS = 20
"""Resamples of fewer hardly say how long tails are, nor how those of rows hang together: with 8 documents, 13 rows and
skewed scores, intervals of a level that is read off them held in 91 % of the tables."""
LEANING = 0.25
"""Mean skewness of the rows' changes above which few documents are taken for skewed. Methods lose on the same
documents, so that rows lean to one side together."""
FURTHER = 1.2
"""Rows of few skewed documents count as so many independent ones, to this power: the further out in the tails, the more
often the truth is beyond them."""
MANY_DOCUMENTS = 30
SKEWED = 0.75
"""Fewer documents whose changes have a greater skewness do not say how long their tails are: where a power of 80 % was
claimed from them, simulations found 67 to 91 %."""


class Judged(NamedTuple):
    """Rows judged by resamples."""

    low: Array
    high: Array
    p_values: Array
    upper: Array
    """Critical values of the estimate over its standard error, above and below."""
    lower: Array
    joint: Joint


def resampled_joint(studentized: Array, alpha: float = ALPHA) -> Joint:
    """The family's level, from the ranks of resamples [rows, draws] among those of their row; equal ones share the
    greatest."""
    order = np.argsort(studentized, axis=1)
    ascending = np.take_along_axis(studentized, order, axis=1)
    draws = studentized.shape[1]
    places = np.broadcast_to(np.arange(1, draws + 1), studentized.shape)
    ends_tie = np.concatenate(
        [ascending[:, 1:] != ascending[:, :-1], np.ones((len(studentized), 1), dtype=bool)], axis=1
    )
    shared = np.minimum.accumulate(np.where(ends_tie, places, draws)[:, ::-1], axis=1)[:, ::-1]
    shares = np.empty(studentized.shape)
    np.put_along_axis(shares, order, shared / (draws + 1), axis=1)
    return joint(np.minimum(2 * np.minimum(shares, 1.0 - shares), 1.0), alpha)


def leans(changes: Array, *, together: bool = True) -> NDArray[np.bool_]:
    """Of which rows of changes [rows, n] the tails must be taken for longer than a normal distribution's.

    Args:
        together: as one family; else each row for itself.
    """
    rows, n = changes.shape
    if n >= FEW_DOCUMENTS:
        return np.ones(rows, dtype=bool)
    skewness = skewness_of(changes)
    found: NDArray[np.bool_] = np.abs(skewness.mean(keepdims=True) if together else skewness) > LEANING
    return np.broadcast_to(found, rows)


def judge(resampled: Resampled, changes: Array, alpha: float = ALPHA) -> Judged:
    """Intervals and p-values of rows [rows] from resamples of n documents, or sources of them, that all rows share.

    Args:
        changes: what each of these adds to the estimate [rows, n].
    """
    rows, n = changes.shape
    drawn = np.sort(resampled.studentized, axis=1)
    leaning = leans(changes)
    far = n < FEW_DOCUMENTS and bool(leaning.all())
    family = unrelated(rows**FURTHER, alpha) if far else resampled_joint(resampled.studentized, alpha)
    return Judged(*at_level(resampled, drawn, n, family.level, leaning), family)


def at_level(
    resampled: Resampled, drawn: Array, n: int, level: float, leaning: NDArray[np.bool_]
) -> tuple[Array, Array, Array, Array, Array]:
    """Ends of intervals, p-values and both critical values of rows that are judged one by one.

    Args:
        drawn: the studentized resamples of each row [rows, draws] in ascending order.
        level: error of each interval.
        leaning: whether the row's resamples are asked at all, see :func:`leans`.
    """
    draws = drawn.shape[1]
    student = student_end(level / 2, n - 1)
    upper = np.where(leaning, np.maximum(quantile(drawn, 1.0 - level / 2), student), student)
    lower = np.where(leaning, np.minimum(quantile(drawn, level / 2), -student), -student)
    observed = np.round(resampled.estimate / resampled.error, DECIMALS)
    beyond = np.stack([np.searchsorted(row, value) for row, value in zip(drawn, observed, strict=True)])
    own = 2 * np.minimum(beyond + 1, draws - beyond + 1) / (draws + 1)
    of_student = 2 * student_tail(np.abs(observed), n - 1)
    p_values = np.clip(np.where(leaning, np.maximum(own, of_student), of_student), 0.0, 1.0)
    outside = (observed > upper) | (observed < lower)
    p_values = np.where(outside, np.minimum(p_values, level * (1.0 - 1e-6)), np.maximum(p_values, level))
    low = resampled.estimate - upper * resampled.error
    high = resampled.estimate - lower * resampled.error
    return low, high, p_values, upper, lower


def detectable_means(resampled: Resampled, judged: Judged, n: int, rows: Array) -> Array:
    """Smallest shifts of the mean, of the chosen ``rows``, that 80 % of the resamples would show, in the direction of
    the one found.

    A resample of documents that are shifted by d is found where ``studentized + d / its error`` is beyond the
    critical value. The widening is that of Student's t over a normal: critical values and errors of other documents
    scatter.
    """
    studentized, errors = resampled.studentized[rows], resampled.errors[rows]
    distance = np.where(
        resampled.estimate[rows, None] < 0,
        (studentized - judged.lower[rows, None]) * errors,
        (judged.upper[rows, None] - studentized) * errors,
    )
    return np.quantile(distance, POWER, axis=1) * math.sqrt((n - 1) / (n - 3))


Pair = tuple[Sequence[float], Sequence[float]]
"""Scores of a method and of what it is compared with, one per document."""


def compare_pairs(
    pairs: Sequence[Pair],
    *,
    binary: bool | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
    logarithm: bool = False,
    alpha: float = ALPHA,
    sources: Sequence[object] | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Every method against its own baseline, all on the same documents, as one family.

    Args:
        pairs: scores of each method, and of its baseline.
        binary: whether every score is one of the two ends of its range; None is what these are.
        bounds: between which every score lies.
        logarithm: compare by the ratio of the means, on the log scale; for scores above 0.
        alpha: error that the family may have; less than 0.05 where it is a part of a larger one.
        sources: of the documents, see :func:`bench.judge.stats.by_source`.
        seed: of the resamples.

    Raises:
        ValueError: not the same number of documents, none, or a score that is no number.
    """
    if not pairs:
        return []
    changes = np.stack([paired(own, baseline) for own, baseline in pairs])
    if binary is None:
        binary = is_binary(*(scores for pair in pairs for scores in pair), bounds=bounds)
    if binary:
        found = _compare_binary(changes, sources, ends(bounds)[1] - ends(bounds)[0], alpha, seed)
    elif logarithm:
        own, baselines = (np.array([pair[side] for pair in pairs], dtype=float) for side in (0, 1))
        found = _compare_ratios(own, baselines, sources, alpha, seed)
    else:
        found = _compare_means(changes, sources, bounds[1] - bounds[0], alpha, seed)
    n = changes.shape[1]
    if (n if sources is None else len(set(sources))) < LEAST_DOCUMENTS:
        return [Comparison(n=n, difference=item.difference) for item in found]
    return [_of_larger(item, ALPHA / alpha) for item in found]


def compare_all(scores: Sequence[Sequence[float]], baseline: Sequence[float], **how: Any) -> list[Comparison]:
    """Every method against one baseline, on the same documents. See :func:`compare_pairs`."""
    return compare_pairs([(own, baseline) for own in scores], **how)


def compare_over(
    pairs: Sequence[tuple[Mapping[Document, float], Mapping[Document, float]]],
    sources: Callable[[Iterable[Document]], Sequence[object]],
    **how: Any,
) -> list[Comparison]:
    """As :func:`compare_pairs`, of methods that need not have answered the same documents: one family all the same.

    Methods over other documents have a share of the family's error of their own (Bonferroni).

    Args:
        pairs: scores by document of each method, and of its baseline, which has at least those documents.
        sources: what documents are made of.
    """
    sets: dict[tuple[Document, ...], list[int]] = {}
    for place, (mine, _) in enumerate(pairs):
        sets.setdefault(tuple(mine), []).append(place)
    found: dict[int, Comparison] = {}
    for documents, places in sets.items():
        scores = [([side[document] for document in documents] for side in pairs[place]) for place in places]
        together = [(own, baseline) for own, baseline in scores]
        alpha = ALPHA * len(places) / len(pairs)
        found |= zip(places, compare_pairs(together, alpha=alpha, sources=sources(documents), **how), strict=True)
    return [found[place] for place in range(len(pairs))]


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


def _compare_binary(
    changes: Array, sources: Sequence[object] | None, scale: float, alpha: float, seed: int
) -> list[Comparison]:
    units = np.sign(changes)
    n = units.shape[1]
    found = judge_proportions(units, sources, alpha, seed)
    adjusted = found.joint.adjusted(found.p_values)
    changed = np.abs(units).mean(axis=1)
    return [
        Comparison(
            n=n,
            difference=scale * float(units[row].mean()),
            interval=Interval(scale * float(found.low[row]), scale * float(found.high[row])),
            p_value=float(found.p_values[row]),
            p_adjusted=float(adjusted[row]),
            detectable=_scaled(found.tests[row].detectable(float(changed[row])), scale),
        )
        for row in range(len(units))
    ]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _compare_means(
    changes: Array, sources: Sequence[object] | None, width: float, alpha: float, seed: int
) -> list[Comparison]:
    n = changes.shape[1]
    sums, sizes = by_source(changes, sources)
    groups = len(sizes)
    # Where all documents changed alike, nothing is known of how they scatter.
    known = np.flatnonzero(np.ptp(sums / sizes, axis=1) > 0) if groups >= LEAST_DOCUMENTS else np.array([], dtype=int)
    found = []
    for row in changes:
        nothing = 1.0 if not row.any() else None
        found.append(Comparison(n=n, difference=float(row.mean()), p_value=nothing, p_adjusted=nothing))
    if not len(known):
        return found
    resampled = means(sums[known], sizes, seed=seed)
    judged = judge(resampled, sums[known] - resampled.estimate[:, None] * sizes, alpha)
    few = (sums[known] != 0).sum(axis=1) < LEAST_DOCUMENTS
    low, high, p_values = judged.low, judged.high, judged.p_values
    if few.any():
        largest = width if math.isfinite(width) else float(np.abs(changes).max())
        low[few], high[few], p_values[few] = unseen_changes(sums[known[few]], sizes, largest, judged.joint.level, seed)
    detectable = np.full(len(known), math.inf)
    said = ~few if groups >= MANY_DOCUMENTS else ~few & (np.abs(skewness_of(sums[known])) <= SKEWED)
    if said.any():
        detectable[said] = detectable_means(resampled, judged, groups, said)
    adjusted = judged.joint.adjusted(p_values)
    for place, row in enumerate(known):
        ends_of = np.clip([low[place], high[place]], -width, width)
        found[row] = Comparison(
            n=n,
            difference=found[row].difference,
            interval=Interval(float(ends_of[0]), float(ends_of[1])),
            p_value=float(p_values[place]),
            p_adjusted=float(adjusted[place]),
            detectable=float(detectable[place]) if detectable[place] < width else None,
        )
    return found


def _compare_ratios(
    values: Array, baselines: Array, sources: Sequence[object] | None, alpha: float, seed: int
) -> list[Comparison]:
    n = values.shape[1]
    found = []
    for above, below in zip(values.sum(axis=1), baselines.sum(axis=1), strict=True):
        # Nothing is a multiple of 0.
        ratio = above / below if below else math.inf if above else 1.0
        found.append(Comparison(n=n, difference=float(ratio)))
    sums, sizes = by_source(values, sources)
    below, _ = by_source(baselines, sources)
    # Where a method is the same multiple in all documents, nothing is known of how it scatters.
    known = [
        row
        for row, (mine, other) in enumerate(zip(sums, below, strict=True))
        if mine.any() and other.any() and not np.allclose(mine / mine.mean(), other / other.mean())
    ]
    if not known or len(sizes) < LEAST_DOCUMENTS:
        return found
    mine, other = sums[known], below[known]
    changes = mine / mine.mean(axis=1, keepdims=True) - other / other.mean(axis=1, keepdims=True)
    judged = judge(log_ratios(mine, other, seed), changes, alpha)
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
