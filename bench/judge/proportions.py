"""The rows of a table whose scores have two values, judged together by what the test of paired proportions says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import special

from bench.judge.exact import MOST_COUNTED, mid_p, mid_p_interval
from bench.judge.joint import Joint, of_normal, of_signs
from bench.judge.power import Counted, McNemar, Paired
from bench.judge.resampling import Array
from bench.judge.stats import by_source, design_effect, normal, paired_proportions
from bench.judge.verdict import ALPHA


class Proportions(NamedTuple):
    """Rows of which it is counted how many documents rose and fell."""

    low: Array
    high: Array
    p_values: Array
    joint: Joint
    tests: Sequence[Paired]
    """What each row was judged by."""


def judge_proportions(
    units: Array, sources: Sequence[object] | None = None, alpha: float = ALPHA, seed: int = 0
) -> Proportions:
    """Intervals and p-values of signs of changes [rows, n], for the family: few independent documents are counted out,
    of others it is the score statistic that is judged."""
    n = units.shape[1]
    sums, sizes = by_source(units, sources)
    if len(sizes) == n <= MOST_COUNTED:
        return counted(units, of_signs(units, alpha, seed))
    return scored(units, sources, of_normal(sums, alpha, seed))


def counted(units: Array, joint: Joint) -> Proportions:
    """Mid-p intervals and p-values of few independent documents."""
    rows, n = units.shape
    gained, lost = (units > 0).sum(axis=1).astype(float), (units < 0).sum(axis=1).astype(float)
    low, high = mid_p_interval(n, gained, lost, joint.level)
    return Proportions(low, high, mid_p(n, gained, lost, np.zeros(rows)), joint, [Counted(n, joint.level)] * rows)


def scored(units: Array, sources: Sequence[object] | None, joint: Joint) -> Proportions:
    """Tango's intervals and McNemar's p-values."""
    n = units.shape[1]
    groups = n if sources is None else len(set(sources))
    critical = normal(groups, n, joint.level)
    gained, lost = (units > 0).sum(axis=1), (units < 0).sum(axis=1)
    # Documents of few sources say as much as so many fewer independent ones.
    fewer = design_effect(units, sources)
    low, high = paired_proportions(gained / fewer, lost / fewer, n / fewer, critical)
    statistics = (gained - lost) / np.sqrt(np.maximum(gained + lost, 1) * fewer)
    beyond = special.ndtr if groups == n else partial(special.stdtr, groups - 1)
    tests = [McNemar(int(n / part), critical) for part in fewer]
    return Proportions(low, high, 2 * beyond(-np.abs(statistics)), joint, tests)
