"""Intervals that cover what they promise, tests that are exact, and adjustments against published examples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as reference

from bench.judge import resampling, stats
from bench.judge.verdict import verdict

REPETITIONS = 2000


def correlated_binary(n: int, method: float, full: float, correlation: float) -> tuple[np.ndarray, float]:
    """Differences [REPETITIONS, n] of 0/1 scores of two methods on the same documents, and their true mean."""
    rng = np.random.default_rng(n)
    latent = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size=(REPETITIONS, n))
    right = latent < reference.norm.ppf([method, full])
    return right[..., 0].astype(float) - right[..., 1], method - full


def skewed(n: int, kind: str) -> tuple[np.ndarray, float]:
    """Paired differences of skewed continuous scores [REPETITIONS, n], and their true mean."""
    rng = np.random.default_rng(n)
    shared = rng.normal(size=(REPETITIONS, n))
    if kind == "divergence":
        # As KL to the full cache: the full cache's own is 0, the method's is positive with a long tail.
        return rng.gamma(1.0, 0.05, size=(REPETITIONS, n)), 0.05
    # The method loses an exponential amount of what the document gives.
    return shared + 0.3 - rng.exponential(0.5, size=(REPETITIONS, n)) - shared, -0.2


def coverage(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("n", [20, 50, 100])
@pytest.mark.parametrize(("method", "full", "correlation"), [(0.7, 0.9, 0.6), (0.4, 0.5, 0.5), (0.6, 0.6, 0.7)])
def test_coverage_of_the_difference_of_binary_scores(n: int, method: float, full: float, correlation: float) -> None:
    differences, truth = correlated_binary(n, method, full, correlation)
    low, high = stats.paired_proportions((differences > 0).sum(1), (differences < 0).sum(1), n)
    assert 0.93 <= coverage(low, high, truth) <= 0.97


@pytest.mark.parametrize("n", [20, 50, 100])
@pytest.mark.parametrize("kind", ["divergence", "loss"])
def test_coverage_of_the_difference_of_skewed_scores(n: int, kind: str) -> None:
    differences, truth = skewed(n, kind)
    low, high = resampling.bootstrap_t(differences, resamples=999)
    assert 0.93 <= coverage(low, high, truth) <= 0.97


def test_the_single_calls_are_the_vectorised_ones() -> None:
    """What a table shows is what the coverage above was measured of."""
    differences, _ = skewed(20, "divergence")
    low, high = resampling.bootstrap_t(differences[:3])
    for index in range(3):
        interval = stats.difference_interval(differences[index].tolist(), [0.0] * 20)
        assert interval == pytest.approx((low[index], high[index]))
    binary, _ = correlated_binary(20, 0.4, 0.5, 0.5)
    first = binary[0]
    scores, baseline = (first > 0).astype(float), (first < 0).astype(float)
    expected = np.array(stats.paired_proportions((first > 0).sum(), (first < 0).sum(), 20))
    assert stats.difference_interval(scores.tolist(), baseline.tolist()) == pytest.approx(expected)


@pytest.mark.parametrize(("gained", "lost", "n"), [(12, 2, 50), (1, 3, 44), (3, 0, 20)])
def test_tango_against_its_definition(gained: int, lost: int, n: int) -> None:
    """At both ends the difference is 1.96 standard errors away, these from the likelihood maximised by search."""
    for end in stats.paired_proportions(gained, lost, n):

        def cost(share: float, end: float = float(end)) -> float:
            # Shares of lost, gained and unchanged documents that have the difference ``end``.
            shares = [share, share + end, 1 - 2 * share - end]
            return -float(reference.multinomial.logpmf([lost, gained, n - gained - lost], n, shares))

        low, high = max(0.0, -end), (1 - end) / 2
        share = optimize.minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x
        error = np.sqrt((2 * share + end - end**2) / n)
        assert abs((gained - lost) / n - end) == pytest.approx(1.959964 * error, rel=1e-3)


def test_no_discordant_document_is_not_certainty() -> None:
    low, high = stats.paired_proportions(0, 0, 20)
    half = 1.959964**2 / (20 + 1.959964**2)
    assert (float(low), float(high)) == pytest.approx((-half, half), abs=1e-5)


def test_a_perfect_score_is_not_certain() -> None:
    interval = stats.mean_interval([1.0] * 6)
    assert interval is not None
    assert interval.high == 1.0
    assert interval.low == pytest.approx(6 / (6 + 1.959964**2))


def test_intervals_are_seeded_and_unknown_where_documents_are_too_few_or_equal() -> None:
    scores = [0.1, 0.7, 0.4, 0.2, 0.9, 0.35]
    assert stats.mean_interval(scores, seed=1) == stats.mean_interval(scores, seed=1)
    assert stats.mean_interval(scores, seed=1) != stats.mean_interval(scores, seed=2)
    assert stats.mean_interval(scores[:4]) is None
    assert stats.mean_interval([0.3] * 10) is None
    assert stats.difference_interval([0.5, 0.6, 0.7, 0.8, 0.3], [0.5, 0.6, 0.7, 0.8, 0.3]) is None


def test_scores_in_percent_that_are_right_or_wrong() -> None:
    percent = (0.0, 100.0)
    assert stats.mean_interval([100.0] * 19 + [0.0], bounds=percent) == pytest.approx((76.4, 99.1), abs=0.1)
    assert stats.mean_interval([0.0] * 20, bounds=percent) == pytest.approx((0.0, 16.1), abs=0.1)
    # A metric without a range: right and wrong are 1 and 0.
    assert stats.mean_interval([0.0] * 20) == pytest.approx((0.0, 0.161), abs=0.001)
    difference = stats.difference_interval([100.0] * 17 + [0.0] * 3, [100.0] * 20, bounds=percent)
    unit = stats.difference_interval([1.0] * 17 + [0.0] * 3, [1.0] * 20)
    assert unit is not None
    assert difference == pytest.approx([100 * end for end in unit])


@pytest.mark.parametrize("n", [20, 50])
def test_intervals_of_divergences_are_above_0(n: int) -> None:
    rng = np.random.default_rng(n)
    found = [stats.mean_interval(scores.tolist(), logarithm=True) for scores in rng.gamma(1.0, 0.05, size=(300, n))]
    assert all(interval is not None and interval.low > 0 for interval in found)
    held = [interval.low <= 0.05 <= interval.high for interval in found if interval is not None]
    assert 0.91 <= np.mean(held) <= 0.99


def test_what_is_no_number_is_named_and_never_averaged() -> None:
    with pytest.raises(ValueError, match="2 of 6 scores are no numbers: those of documents 1, 4"):
        stats.mean_interval([0.1, float("nan"), 0.2, 0.3, float("inf"), 0.5])


def test_no_interval_leaves_the_range_of_its_score() -> None:
    scores, baseline = [0.95, 1.0, 0.9, 1.0, 0.7], [0.05, 0.0, 0.1, 0.0, 0.3]
    for find in (stats.mean_interval, lambda values, **more: stats.difference_interval(values, baseline, **more)):
        free = find(scores)
        assert free is not None
        assert -1.0 < free.low < 1.0 < free.high
        assert find(scores, bounds=(0.0, 1.0)) == (free.low, 1.0)


@pytest.mark.parametrize("n", [5, 20, 50])
def test_coverage_of_intervals_that_are_cut_to_the_range(n: int) -> None:
    """Agreement near 1: cutting takes nothing from the coverage, since the truth lies within the range."""
    rng = np.random.default_rng(n)
    scores = rng.binomial(16, 0.9, size=(REPETITIONS, n)) / 16
    low, high = resampling.bootstrap_t(scores, resamples=999)
    assert 0.93 <= coverage(np.clip(low, 0, 1), np.clip(high, 0, 1), 0.9) <= 0.97


def test_few_documents_that_differ_still_give_a_finite_interval() -> None:
    scores = [0.5] * 19 + [0.1]
    interval = stats.difference_interval(scores, [0.5] * 20)
    assert interval is not None
    assert np.isfinite(interval).all()
    assert interval.low < -0.02 < interval.high


def test_adjustments_against_known_values() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert stats.holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.benjamini_hochberg(p_values) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == stats.benjamini_hochberg([]) == []


def test_wording() -> None:
    assert verdict(-0.3, 0.2) == "tied"
    assert verdict(-0.3, 0.0311) == "worse, p 0.031"
    assert verdict(-0.3, 0.0001, higher_is_better=False) == "better, p <0.001"
    assert verdict(0.1, None) == ""


def test_pseudomedian_is_that_of_the_textbook() -> None:
    # Depression scores before and after a treatment: Hollander & Wolfe, example 3.1 and its continuations.
    before = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
    after = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
    estimate, interval = stats.pseudomedian([new - old for new, old in zip(after, before, strict=True)])
    assert estimate == pytest.approx(-0.46)
    assert interval == pytest.approx((-0.786, -0.010))
    assert stats.pseudomedian([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, None)


@pytest.mark.parametrize("n", [12, 80])
def test_pseudomedian_stays_where_most_values_are(n: int) -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        values = rng.normal(size=n)
        values[rng.random(n) < 0.05] *= 50
        interval = stats.pseudomedian(values)[1]
        assert interval is not None
        found += interval.low < 0 < interval.high
    assert 180 <= found <= 199
