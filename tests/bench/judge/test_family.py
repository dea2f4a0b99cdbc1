"""Intervals and verdicts of whole tables: one procedure, which covers and finds as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bench.judge import joint, resampling
from bench.judge.family import compare, compare_all
from bench.judge.power import McNemar, documents_needed, of_rows, too_few
from scripts.coverage import BOUNDS, claimed, claimed_of_answers, coverage, found, found_of_answers, tables

Array = np.ndarray


@pytest.mark.parametrize(("kind", "n"), [("binary", 20), ("percent", 20), ("skewed", 20)])
def test_all_intervals_of_a_table_hold_together(kind: str, n: int) -> None:
    assert coverage(kind, 100, 4, n)[0] >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 20, 50, 200])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("kind", ["binary", "percent", "skewed"])
def test_coverage(kind: str, rows: int, n: int) -> None:
    """93 to 97 %; more where few documents have few counts. The error of a share of 1,000 tables is 0.7 %."""
    high = 1.0 if kind == "binary" and n <= 20 else 0.97
    assert 0.93 - 0.015 <= coverage(kind, 1000, rows, n)[0] <= high + 0.015


def test_the_last_digits_of_scores_decide_nothing() -> None:
    """Processors differ in them. Few documents of few scores have many equal resamples, whose ties are counted."""
    for seed in range(6):
        generator = np.random.default_rng(seed)
        full = generator.choice([80.0, 100.0], size=20)
        methods = [np.maximum(full - generator.choice([0.0, 0.0, 20.0, 40.0, 60.0], size=20), 0.0) for _ in range(5)]
        tables = [compare_all([list(own / scale) for own in methods], list(full / scale)) for scale in (1.0, 3.0)]
        found = [[(item.p_value, item.p_adjusted) for item in table] for table in tables]
        assert found[0] == found[1]


def power_of(differences: Array) -> float:
    """Share of samples [repetitions, n] that are found to differ."""
    found = [compare(sample.tolist(), [0.0] * len(sample)) for sample in differences]
    return float(np.mean([item.p_adjusted is not None and item.p_adjusted < 0.05 for item in found]))


@pytest.mark.parametrize("n", [8, 20, 50, 200])
@pytest.mark.parametrize("rows", [1, 13])
def test_power_of_scores_of_two_values(n: int, rows: int) -> None:
    """The smallest difference that is claimed is found in 80 % of the tables, by the test that tables are judged by."""
    claim = claimed_of_answers(n, rows)
    if claim is None:
        assert n == 8
        assert rows == 13
        return
    assert found_of_answers(claim, n, rows, 4000) == pytest.approx(0.8, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 20, 50, 200])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", ["normal", "percent", "skewed"])
def test_power_of_other_scores(shape: str, sign: int, n: int) -> None:
    """Documents alike in shape show the difference that a table claims, whichever way the scores are skewed; of few
    skewed ones, whose tails are not known, it claims nothing."""
    claim = claimed(shape, sign, n)
    if shape == "skewed" and n <= 20:
        assert claim is None
        return
    assert claim is not None
    # The error of a share of 2,000 samples is 0.9 %.
    assert found(shape, sign * claim, n, 2000) == pytest.approx(0.8, abs=0.05 + 2 * 0.009)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "n"), [(1, 8), (13, 8), (13, 20)])
def test_coverage_of_scores_that_are_mostly_0(rows: int, n: int) -> None:
    """Where few documents change at all, how much they do is not known: intervals are wide rather than wrong."""
    assert coverage("mostly 0", 300, rows, n)[0] >= 0.93 - 0.03


def test_few_documents_that_change_may_hide_others_that_change_more() -> None:
    """Of twenty documents three fell; one that was not among them may have lost, or won, all."""
    full, method = [0.9] * 20, [0.9] * 17 + [0.7, 0.4, 0.88]
    (one,) = compare_all([method], full, bounds=(0.0, 1.0))
    assert one.difference == pytest.approx(-0.036)
    assert one.interval is not None
    assert one.interval.low < -0.15
    assert one.interval.high > 0.05
    assert one.detectable is None
    (percent,) = compare_all([[100 * value for value in method]], [90.0] * 20, bounds=(0.0, 100.0))
    assert percent.interval == pytest.approx([100 * value for value in one.interval])
    assert percent.p_value == pytest.approx(one.p_value)
    # Without a range, as much as any document of the table changed.
    (free,) = compare_all([method], full)
    assert free.interval is not None
    assert one.interval.low < free.interval.low < -0.036
    # Where each changed by as much as can be, these are Jeffreys' intervals of their share.
    (total,) = compare_all([[0.0] * 3 + [0.5] * 17], [1.0] * 3 + [0.5] * 17, bounds=(0.0, 1.0))
    assert total.interval is not None
    assert total.interval.low == pytest.approx(-stats.beta(3.5, 17).isf(0.025), abs=0.01)


@pytest.mark.parametrize("kind", ["binary", "percent", "skewed", "mostly 0"])
@pytest.mark.parametrize("n", [6, 8, 30])
def test_an_interval_without_0_and_a_tie_never_stand_in_one_row(kind: str, n: int) -> None:
    scores, full, _ = tables(kind, 15, 5, n)
    bounds = BOUNDS.get(kind, (-math.inf, math.inf))
    for mine, baseline in zip(scores, full, strict=True):
        for alpha in (0.05, 0.02):
            for item in compare_all(list(mine), baseline, bounds=bounds, alpha=alpha):
                if item.interval is not None and item.p_adjusted is not None:
                    assert (item.interval.low <= 0 <= item.interval.high) == (item.p_adjusted >= 0.05)


def test_all_of_eight_against_none_is_a_verdict_whatever_else_stands_there() -> None:
    """Methods fail on the same documents: twelve rows more need not take the verdict from the one that fails on all."""
    rng = np.random.default_rng(0)
    full = [1.0] * 8
    others = [(rng.random(8) < 0.6).astype(float).tolist() for _ in range(12)]
    found = compare_all([[0.0] * 8, *others], full, bounds=(0.0, 1.0))
    assert found[0].p_adjusted is not None
    assert found[0].p_adjusted < 0.05


def test_a_scale_changes_nothing() -> None:
    """0 and 100 are as binary as 0 and 1 are."""
    full, method = [1.0] * 20, [1.0] * 14 + [0.0] * 6
    one = compare_all([method], full, bounds=(0.0, 1.0))[0]
    percent = compare_all([[100 * value for value in method]], [100.0] * 20, bounds=(0.0, 100.0))[0]
    assert percent.difference == pytest.approx(100 * one.difference)
    assert percent.interval == pytest.approx([100 * value for value in one.interval or ()])
    assert (percent.p_value, percent.p_adjusted) == (one.p_value, one.p_adjusted)
    assert percent.detectable == pytest.approx(100 * (one.detectable or 0))


def test_rows_that_move_together_need_less_adjusting() -> None:
    rng = np.random.default_rng(1)
    full = np.ones(30)
    method = (rng.random(30) < 0.75).astype(float)
    alone = compare_all([method], full)[0].p_adjusted
    same = compare_all([method] * 10, full)[0].p_adjusted
    others = [(rng.random(30) < 0.75).astype(float) for _ in range(9)]
    apart = compare_all([method, *others], full)[0].p_adjusted
    assert alone is not None
    assert same is not None
    assert apart is not None
    assert alone <= same < apart
    assert same == pytest.approx(alone, rel=0.3, abs=0.005)


def test_ratios_of_divergences() -> None:
    rng = np.random.default_rng(2)
    document = rng.gamma(1.0, size=40)
    best = 0.02 * document * rng.lognormal(0, 0.3, size=40)
    twice = 0.04 * document * rng.lognormal(0, 0.3, size=40)
    alike = 0.02 * document * rng.lognormal(0, 0.3, size=40)
    found = compare_all([twice, alike], best, logarithm=True, bounds=(0.0, math.inf))
    assert found[0].interval is not None
    assert 1 < found[0].interval.low < found[0].difference < found[0].interval.high < 3
    assert found[0].p_adjusted is not None
    assert found[0].p_adjusted < 0.05
    assert found[1].interval is not None
    assert 0 < found[1].interval.low < 1 < found[1].interval.high
    # Nothing is a multiple of 0, and a ratio that is the same for every document has no scatter.
    assert compare_all([best], np.zeros(40), logarithm=True)[0].p_value is None
    assert compare_all([2 * best], best, logarithm=True)[0].interval is None


def test_what_documents_do_not_say() -> None:
    equal = compare([0.5] * 10, [0.5] * 10)
    assert (equal.difference, equal.interval, equal.p_adjusted) == (0.0, None, 1.0)
    assert compare([0.5] * 10, [0.25] * 10).p_adjusted is None
    one = compare([0.0], [1.0])
    assert (one.difference, one.interval, one.p_adjusted) == (-1.0, None, None)
    with pytest.raises(ValueError, match="1 of 3 scores are no numbers: those of documents 1"):
        compare([0.1, math.nan, 0.2], [0.1, 0.1, 0.1])


@pytest.mark.parametrize("kind", ["binary", "percent", "ratio"])
def test_many_documents_are_judged_as_few_are_a_block_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(5).random((4, 60))
    if kind == "binary":
        drawn = np.round(drawn)
    rows = [(0.7 * drawn[0] + 0.3 * row if kind == "percent" else row).tolist() for row in drawn[1:]]
    how = {"bounds": (0.0, math.inf if kind == "ratio" else 1.0), "logarithm": kind == "ratio"}
    whole = compare_all(rows, drawn[0].tolist(), **how)
    for module in (joint, resampling):
        monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 60 * 1000)
    parts = compare_all(rows, drawn[0].tolist(), **how)
    for one, other in zip(whole, parts, strict=True):
        assert (one.n, one.difference) == (other.n, other.difference)
        # Of scores of two values the normal numbers are other ones, from the same distribution.
        near = pytest.approx(other.p_adjusted, abs=0.02 if kind == "binary" else 1e-9)
        assert one.p_adjusted == near
        assert one.interval == pytest.approx(other.interval, abs=0.01 if kind == "binary" else 1e-9)


def test_documents_before_a_run() -> None:
    assert "none, whatever they score" in too_few(7, 13)
    assert "only one that loses 97 % of the answers" in too_few(8, 13)
    needed = documents_needed(13)
    assert needed is not None
    assert f"{needed} could" in too_few(8, 13)
    assert too_few(needed, 13) == too_few(2, 0) == ""
    assert of_rows(needed, 13).power(0.5, 0.5) >= 0.8 > of_rows(needed - 1, 13).power(0.5, 0.5)
    assert McNemar(4, 1.96).detectable() is None
