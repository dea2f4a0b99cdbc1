"""Right and wrong of few documents, counted out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.judge.exact import MOST_COUNTED, mid_p, mid_p_interval, mid_p_of_none
from bench.judge.joint import independent_level, of_signs
from bench.judge.power import Counted, McNemar


def outcomes(n: int) -> tuple[np.ndarray, np.ndarray]:
    gained, lost = np.meshgrid(np.arange(n + 1.0), np.arange(n + 1.0))
    possible = gained + lost <= n
    return gained[possible], lost[possible]


def test_mid_p_is_that_of_the_trinomial_distribution() -> None:
    """All of eight lost: nothing is further away, and half of its own chance counts, on both sides."""
    assert mid_p(8, np.array([0.0]), np.array([8.0]), np.array([0.0])) == pytest.approx(0.5**8)
    assert mid_p(8, np.array([0.0]), np.array([0.0]), np.array([0.0])) == pytest.approx(1.0)
    # Seven of eight: all of eight is further away, in two ways; of seven there are eight, of which half count.
    assert mid_p(8, np.array([0.0]), np.array([7.0]), np.array([0.0]))[0] == pytest.approx(
        2 * (stats.multinomial(8, [7 / 16, 7 / 16, 1 / 8]).pmf([[0, 8, 0], [0, 7, 1]]) * [1, 0.5]).sum(), rel=1e-6
    )
    assert mid_p(8, np.array([0.0]), np.array([4.0]), np.array([-0.5]))[0] > 0.8


@pytest.mark.parametrize("n", [1, 5, 8, 13])
@pytest.mark.parametrize("level", [0.05, 0.004])
def test_intervals_hold_0_if_and_only_if_its_p_is_not_below_the_level(n: int, level: float) -> None:
    gained, lost = outcomes(n)
    low, high = mid_p_interval(n, gained, lost, level)
    p_values = mid_p(n, gained, lost, np.zeros(len(gained)))
    assert (((low <= 0) & (high >= 0)) == (p_values >= level)).all()
    assert (low >= -1).all()
    assert (high <= 1).all()
    assert (low <= (gained - lost) / n).all()
    assert (high >= (gained - lost) / n).all()
    # What is won by one is lost by the other.
    mirrored_low, mirrored_high = mid_p_interval(n, lost, gained, level)
    assert low == pytest.approx(-mirrored_high, abs=1e-6)
    assert high == pytest.approx(-mirrored_low, abs=1e-6)
    assert mid_p_of_none(n)[gained.astype(int), lost.astype(int)] == pytest.approx(p_values)


@pytest.mark.parametrize("n", [8, 20])
def test_intervals_hold_in_95_percent_on_average_over_truths(n: int) -> None:
    gained, lost = outcomes(n)
    low, high = mid_p_interval(n, gained, lost, 0.05)
    held = []
    for lose in np.linspace(0.05, 0.9, 12):
        for win in np.linspace(0.0, 1.0 - lose, 5):
            chances = stats.multinomial(n, [win, lose, max(1 - win - lose, 0.0)]).pmf(
                np.stack([gained, lost, n - gained - lost], axis=1)
            )
            held.append(chances[(low <= win - lose) & (win - lose <= high)].sum())
    assert min(held) > 0.9
    assert 0.945 < np.mean(held) < 0.98


def test_rows_that_are_alike_have_the_level_of_one_and_unlike_ones_of_so_many() -> None:
    rng = np.random.default_rng(0)
    row = rng.choice([-1.0, 0.0, 1.0], size=20)
    assert of_signs(np.stack([row] * 6)).level > 0.02
    apart = of_signs(rng.choice([-1.0, 1.0], size=(6, 20))).level
    assert independent_level(6) <= apart < 0.02
    assert of_signs(np.zeros((3, 8))).level == independent_level(3)


def test_counting_and_the_score_statistic_meet() -> None:
    n = MOST_COUNTED
    gained, lost = np.array([3.0]), np.array([13.0])
    counted = mid_p(n, gained, lost, np.array([0.0]))[0]
    assert counted == pytest.approx(2 * stats.norm.sf(10 / 4), rel=0.15)
    found, other = Counted(n, 0.05).detectable(0.2), McNemar(n, 1.96).detectable(0.2)
    assert found is not None
    assert found == pytest.approx(other, abs=0.02)
