#!/usr/bin/env python
"""How often the intervals of simulated tables hold the truth, and how often a difference that is claimed to be
detectable is found.

    scripts/coverage.py --outdir results/statistics

A table has so many rows beside the full cache, on the same ``n`` documents. Its intervals *held* if every one of them
holds the true difference of its row, which 95 % of the tables should. Writes ``coverage.csv``, ``attainable.csv`` (of
right and wrong, by what is true and how they are judged), ``designs.csv`` (of other scores of few documents, by how
they are judged), ``power.csv`` and ``record.json``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bench.judge.family import at_level, compare, compare_all, leans, resampled_joint
from bench.judge.joint import independent_level, of_normal
from bench.judge.power import of_rows
from bench.judge.proportions import Proportions, counted, judge_proportions, scored
from bench.judge.resampling import means
from bench.judge.stats import UNBOUNDED
from bench.judge.verdict import ALPHA
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records

Array = NDArray[np.float64]

KINDS = {
    "binary": "right and wrong: 90 % right with the full cache, 60 % with the method",
    "percent": "scores in sixteenths, the method's like the full cache's",
    "skewed": "the method loses an exponential amount of every answer",
    "mostly 0": "one answer in five loses anything, and then any part of it",
}
"""What scores may be like."""
BOUNDS = {"binary": (0.0, 1.0), "percent": (0.0, 100.0), "mostly 0": (0.0, 1.0)}
DOCUMENTS = (8, 20, 50, 200)
ROWS = (1, 6, 13)


def _hardness(rng: np.random.Generator, repetitions: int, rows: int, n: int) -> Array:
    """How hard each document is for each method [repetitions, rows + 1, n], in part the same for all of them."""
    shared = rng.normal(size=(repetitions, 1, n))
    return math.sqrt(0.6) * shared + math.sqrt(0.4) * rng.normal(size=(repetitions, rows + 1, n))


def tables(kind: str, repetitions: int, rows: int, n: int, seed: int = 0) -> tuple[Array, Array, float]:
    """Scores of methods [repetitions, rows, n] and of full [repetitions, n], and the true difference of every row."""
    rng = np.random.default_rng([seed, n, rows])
    own = _hardness(rng, repetitions, rows, n)
    if kind == "binary":
        right = own < stats.norm.ppf([0.9] + [0.6] * rows)[:, None]
        return right[:, 1:].astype(float), right[:, 0].astype(float), -0.3
    if kind == "percent":
        scores = 100 * np.round(16 * stats.norm.cdf(own)) / 16
        return scores[:, 1:], scores[:, 0], 0.0
    if kind == "mostly 0":
        full = rng.uniform(0.5, 1.0, size=(repetitions, n))
        lost = (own[:, 1:] > stats.norm.isf(0.2)) * rng.random((repetitions, rows, n))
        return full[:, None] * (1.0 - lost), full, -0.075
    # A method loses an exponential amount, the same for all of them in part.
    lost = 0.5 * rng.exponential(size=(repetitions, 1, n)) + 0.5 * rng.exponential(size=(repetitions, rows, n))
    return own[:, :1] - lost, own[:, 0], -1.0


def coverage(kind: str, repetitions: int, rows: int, n: int) -> tuple[float, float]:
    """Share of tables in which every row's interval holds the true difference, and share of rows without one, which
    hold it too."""
    scores, full, truth = tables(kind, repetitions, rows, n)
    held = unknown = 0
    for mine, baseline in zip(scores, full, strict=True):
        compared = compare_all(list(mine), baseline, bounds=BOUNDS.get(kind, UNBOUNDED))
        held += all(item.interval is None or item.interval.low <= truth <= item.interval.high for item in compared)
        unknown += sum(item.interval is None for item in compared)
    return held / repetitions, unknown / repetitions / rows


TRUTHS = ((0.95, 0.95), (0.9, 0.9), (0.7, 0.7), (0.9, 0.6), (0.9, 0.3), (0.5, 0.1), None)
"""Shares of right answers of full and of every method; None draws them for each table: of full between a half and all,
of each method between a fifth and all of these."""


def _score(units: Array) -> Proportions:
    return scored(units, None, of_normal(units))


def _shorter(units: Array) -> Proportions:
    family = of_normal(units)
    return scored(units, None, family._replace(level=2 * stats.norm.sf(0.9 * stats.norm.isf(family.level / 2))))


DESIGNS: dict[str, Callable[[Array], Proportions]] = {
    "counted": judge_proportions,
    "counted, normal": lambda units: counted(units, of_normal(units)),
    "score": _score,
    "score, 0.9": _shorter,
}
"""Ways to judge right and wrong of few documents: the one that is used, mid-p at the level that turned signs give; the
same at the level of a normal distribution; the score statistic at that level; and with ends 0.9 as many standard errors
away."""


def attained(
    truth: tuple[float, float] | None, repetitions: int, rows: int, n: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Of every design, the share of tables of right and wrong answers whose intervals all hold, and the share of rows
    that are told from full."""
    rng = np.random.default_rng([seed, n, rows, 2])
    if truth is None:
        full = rng.uniform(0.5, 1.0, size=(repetitions, 1))
        shares = np.concatenate([full, full * rng.uniform(0.2, 1.0, size=(repetitions, rows))], axis=1)
    else:
        shares = np.tile([truth[0], *[truth[1]] * rows], (repetitions, 1))
    right = (_hardness(rng, repetitions, rows, n) < stats.norm.ppf(shares)[..., None]).astype(float)
    counts = {name: np.zeros(2) for name in DESIGNS}
    for answers, share in zip(right, shares, strict=True):
        changes, difference = answers[1:] - answers[0], share[1:] - share[0]
        for name, design in DESIGNS.items():
            low, high, p_values, family, _ = design(changes)
            counts[name] += np.all((low <= difference) & (difference <= high)), np.mean(p_values < family.level)
    return {name: (float(found[0]) / repetitions, float(found[1]) / repetitions) for name, found in counts.items()}


def bootstrapped(kind: str, repetitions: int, rows: int, n: int) -> dict[str, float]:
    """Share of tables of scores that are not of two values whose intervals all hold, were they those of the
    bootstrap-t, with Student's ends where these are further out: at the level that resamples give, and at that of
    independent rows."""
    scores, full, truth = tables(kind, repetitions, rows, n)
    held = {"resampled level": 0, "independent level": 0}
    for mine, baseline in zip(scores, full, strict=True):
        changes = mine - baseline
        known = changes[np.ptp(changes, axis=1) > 0]
        if not len(known):
            held = {name: count + 1 for name, count in held.items()}
            continue
        resampled = means(known)
        drawn = np.sort(resampled.studentized, axis=1)
        for name, level in (
            ("resampled level", resampled_joint(resampled.studentized).level),
            ("independent level", independent_level(rows)),
        ):
            low, high, *_ = at_level(resampled, drawn, n, level, np.ones(len(known), dtype=bool))
            held[name] += bool(np.all((low <= truth) & (truth <= high)))
    return {name: count / repetitions for name, count in held.items()}


SHAPES: dict[str, Callable[[Array], Array]] = {
    "normal": stats.norm().ppf,
    "percent": lambda share: 100 * np.round(16 * stats.triang(0.5, -1, 2).ppf(share)) / 16,
    "skewed": stats.expon(loc=-1).ppf,
}
"""Quantiles of how documents may scatter around their mean."""


def claimed(shape: str, sign: int, n: int) -> float | None:
    """What a table says n documents of this shape can show, of those that are typical for it: its quantiles."""
    typical = SHAPES[shape]((np.arange(n) + 0.5) / n)
    return compare((typical - typical.mean() + sign * 1e-9).tolist(), [0.0] * n).detectable


def found(shape: str, shift: float, n: int, repetitions: int) -> float:
    """Share of samples of n documents around ``shift`` that are told from no difference, by the test of tables."""
    drawn = SHAPES[shape](np.random.default_rng(n).random((repetitions, n)))
    told = 0
    for part in np.array_split(drawn, max(repetitions // 200, 1)):
        resampled = means(part + shift)
        leaning = leans(part - part.mean(axis=1, keepdims=True), together=False)
        p_values = at_level(resampled, np.sort(resampled.studentized, axis=1), n, ALPHA, leaning)[2]
        told += int((p_values < ALPHA).sum())
    return told / repetitions


CHANGED = 0.2
"""Share of answers that become right or wrong, at least."""


def claimed_of_answers(n: int, rows: int) -> float | None:
    """What a table of so many unrelated rows says n right and wrong answers can show."""
    return of_rows(n, rows).detectable(CHANGED)


def found_of_answers(difference: float, n: int, rows: int, repetitions: int) -> float:
    """Share of samples of n answers that are told from no difference, each as one of so many unrelated rows."""
    changed = max(CHANGED, difference)
    gained, lost = (changed - difference) / 2, (changed + difference) / 2
    drawn = np.random.default_rng(n).multinomial(n, [gained, lost, 1 - changed], size=repetitions)
    told = 0
    for (up, down, same), times in zip(*np.unique(drawn, axis=0, return_counts=True), strict=True):
        method, full = [1.0] * up + [0.0] * down + [1.0] * same, [0.0] * up + [1.0] * down + [1.0] * same
        compared = compare_all([method], full, bounds=BOUNDS["binary"], alpha=independent_level(rows))[0]
        interval = compared.interval
        told += int(times) * (interval is not None and not interval.low <= 0 <= interval.high)
    return told / repetitions


def coverages(repetitions: int) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        for n in DOCUMENTS:
            for rows in ROWS:
                held, unknown = coverage(kind, repetitions, rows, n)
                yield {"scores": kind, "documents": n, "rows": rows, "held": held, "unknown": unknown}


def attainable(repetitions: int) -> Iterator[dict[str, Any]]:
    for truth in TRUTHS:
        full, method = truth or ("", "")
        for n in DOCUMENTS[:2]:
            for rows in (min(ROWS), max(ROWS)):
                for design, (held, told) in attained(truth, repetitions, rows, n).items():
                    known = {"full": full, "method": method, "documents": n, "rows": rows}
                    yield {**known, "design": design, "held": held, "told": told}


def powers(repetitions: int) -> Iterator[dict[str, Any]]:
    for n in DOCUMENTS:
        for rows in ROWS:
            claim = claimed_of_answers(n, rows)
            power = None if claim is None else found_of_answers(claim, n, rows, 8 * repetitions)
            known = {"scores": "binary", "documents": n, "rows": rows, "direction": -1}
            yield {**known, "claimed": claim, "power": power}
    for shape in SHAPES:
        for n in DOCUMENTS:
            for sign in (1, -1):
                claim = claimed(shape, sign, n)
                power = None if claim is None else found(shape, sign * claim, n, 2 * repetitions)
                known = {"scores": shape, "documents": n, "rows": 1, "direction": sign}
                yield {**known, "claimed": claim, "power": power}


def designs(repetitions: int) -> Iterator[dict[str, Any]]:
    n = min(DOCUMENTS)
    for kind in ("percent", "skewed", "mostly 0"):
        for rows in ROWS[1:]:
            used, _ = coverage(kind, repetitions, rows, n)
            for design, held in {"used": used, **bootstrapped(kind, repetitions, rows, n)}.items():
                yield {"scores": kind, "documents": n, "rows": rows, "design": design, "held": held}


FILES = {"coverage": coverages, "designs": designs, "attainable": attainable, "power": powers}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--only", choices=FILES, help="one of the files")
    parser.add_argument("--outdir", type=Path, default=Path("runs/statistics"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.outdir.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else FILES:
        lines = []
        for line in FILES[name](options.tables):
            lines.append({**line, "tables": options.tables})
            print(lines[-1], flush=True)
        write_atomic(options.outdir / f"{name}.csv", csv_text(list(lines[0]), lines))
    record = {"finished": records.now(), **records.environment()}
    write_atomic(options.outdir / "record.json", json_text(record))


if __name__ == "__main__":
    main()
