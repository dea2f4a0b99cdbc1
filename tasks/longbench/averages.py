"""Averages over datasets: by category, by language, over all. Every dataset has the same weight, whatever its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from tasks.longbench.datasets import CATEGORIES, DATASETS, LANGUAGES

ALL = "All"


@dataclass(frozen=True, kw_only=True)
class Average:
    """A mean over the datasets of a kind."""

    kind: str
    """A category, a language, or ``All``."""
    score: float
    datasets: int
    """Datasets that it is over."""
    of: int
    """Datasets of the kind there are."""


def averages(scores: Mapping[str, float], known: tuple[str, ...] = tuple(DATASETS)) -> list[Average]:
    """Means by category, then by language, then over all; kinds without a score are left out.

    Args:
        scores: by the name of the dataset, on any scale.
        known: all datasets of the benchmark.
    """
    found: list[Average] = []
    for kind in (*CATEGORIES, *LANGUAGES, ALL):
        # Code is a category and a language, of the same datasets.
        if any(average.kind == kind for average in found):
            continue
        names = [name for name in known if kind in (DATASETS[name].category, DATASETS[name].language, ALL)]
        mine = [scores[name] for name in names if name in scores]
        if mine:
            found.append(Average(kind=kind, score=fmean(mine), datasets=len(mine), of=len(names)))
    return found
