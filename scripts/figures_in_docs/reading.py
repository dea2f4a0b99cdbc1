"""docs/reading.md: how often intervals hold, and SnapKV in two suites."""

from __future__ import annotations

import math
from statistics import fmean

from bench.records.files.csv_ import read_cells
from bench.records.files.markdown import markdown_table
from scripts.figures_in_docs.common import RESULTS, paragraph, percent

FOLDER = RESULTS / "statistics"
REMEDY = "scripts/coverage.py writes it anew"


def coverage() -> str:
    """How often all intervals of simulated tables hold, and what is claimed to be detectable is found."""
    return "\n\n".join([_usual(), _attainable(), _designs(), _power()])


def _usual() -> str:
    """Tables of usual scores."""
    held: dict[tuple[str, str], dict[str, float]] = {}
    tables = set()
    for _, cells in read_cells(FOLDER / "coverage.csv", ["scores", "documents", "rows", "held", "tables"], REMEDY):
        held.setdefault((cells["scores"], cells["rows"]), {})[cells["documents"]] = float(cells["held"])
        tables.add(int(cells["tables"]))
    counts = list(next(iter(held.values())))
    error = 100 * math.sqrt(0.95 * 0.05 / min(tables))
    lowest = 100 * min(value for found in held.values() for value in found.values())
    headers = ["scores", "rows", *(f"n={count}" for count in counts)]
    lines = [[*key, *(f"{100 * found[count]:.1f}" for count in counts)] for key, found in held.items()]
    said = paragraph(
        f"""Percent of {min(tables):,} simulated tables in which *every* interval of a difference to `full` holds the
        true one, by what the scores are like, the rows of the table and the documents (`scripts/coverage.py`,
        `results/statistics`). Asked are 95; the error of each share is about {error:.0f}. The lowest is {lowest:.1f};
        where few documents say little, intervals are rather too wide:"""
    )
    return "\n".join([said, "", *markdown_table(headers, lines, right=range(1, len(headers)))])


def _attainable() -> str:
    """Tables of few right and wrong answers, by what is true, and what such tables tell apart."""
    attained: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    told: dict[tuple[str, str], list[float]] = {}
    tables = set()
    needed = ["full", "method", "documents", "rows", "design", "held", "told", "tables"]
    for _, cells in read_cells(FOLDER / "attainable.csv", needed, REMEDY):
        truth = f"{float(cells['full']):.0%} and {float(cells['method']):.0%}" if cells["full"] else "drawn"
        column = cells["documents"], cells["design"]
        attained.setdefault((truth.replace("%", " %"), cells["rows"]), {})[column] = float(cells["held"])
        if cells["full"] != cells["method"]:
            told.setdefault(column, []).append(float(cells["told"]))
        tables.add(int(cells["tables"]))
    columns = list(next(iter(attained.values())))
    lines = [[*key, *(f"{100 * found[column]:.1f}" for column in columns)] for key, found in attained.items()]
    lowest = [min(found[column] for found in attained.values()) for column in columns]
    lines.append(["lowest of these", "", *(f"{100 * share:.1f}" for share in lowest)])
    lines.append(["rows told from full", "", *(f"{100 * fmean(told[column]):.1f}" for column in columns)])
    headers = ["full and methods", "rows", *(f"n={n}, {design}" for n, design in columns)]
    said = paragraph(
        f"""Of few right and wrong answers no interval holds in 95 % of the tables *whatever is true*, since few counts
        are possible. The same of {min(tables)} tables by what the full cache and the methods truly get right, with 8
        and 20 documents, of four ways to judge them: *counted*, which tables use, mid-p of what was counted, at a level
        that turned signs give; the same at the level of a normal distribution with the rows' correlation; *score*,
        Tango's intervals at that level; and these with ends 0.9 as many standard errors away. *Drawn* are truths that
        differ from table to table, of the full cache from 50 to 100 %, of each method from a fifth to all of these:
        what is to be expected of tables whose truth is not known. The last line is the mean share of rows that are told
        from `full`, of truths in which they differ from it:"""
    )
    return "\n".join([said, "", *markdown_table(headers, lines, right=range(1, len(headers)))])


def _designs() -> str:
    """Tables of few other scores, by the ways to judge them."""
    held: dict[tuple[str, str, str], dict[str, float]] = {}
    for _, cells in read_cells(FOLDER / "designs.csv", ["scores", "documents", "rows", "design", "held"], REMEDY):
        key = cells["scores"], cells["documents"], cells["rows"]
        held.setdefault(key, {})[cells["design"]] = float(cells["held"])
    ways = list(next(iter(held.values())))
    lines = [[*key, *(f"{100 * found[way]:.1f}" for way in ways)] for key, found in held.items()]
    headers = ["scores", "n", "rows", *ways]
    said = paragraph(
        """Other scores of 8 documents, as they are judged, and by the bootstrap-t with Student's ends where these are
        further out, whatever the scores are like: at the level that resamples give, and at that of independent rows:"""
    )
    return "\n".join([said, "", *markdown_table(headers, lines, right=range(1, len(headers)))])


def _power() -> str:
    """How often a difference is found that a table says it can find."""
    power: dict[tuple[str, str, str], dict[str, str]] = {}
    for _, cells in read_cells(FOLDER / "power.csv", ["scores", "documents", "rows", "direction", "power"], REMEDY):
        share = f"{100 * float(cells['power']):.0f}" if cells["power"] else "none"
        key = cells["scores"], cells["rows"], "rise" if cells["direction"] == "1" else "fall"
        power.setdefault(key, {})[cells["documents"]] = share
    counts = list(next(iter(power.values())))
    lines = [[*key, *(found[count] for count in counts)] for key, found in power.items()]
    headers = ["scores", "rows", "true", *(f"n={count}" for count in counts)]
    said = paragraph(
        """Percent of simulated runs in which the smallest difference that a table states is found; asked are 80. Right
        and wrong are of as many unrelated rows; of other scores the documents are typical of their shape: of single
        random samples it is found less often. None is stated of fewer than 30 documents with skewed scores:"""
    )
    return "\n".join([said, "", *markdown_table(headers, lines, right=[1, *range(3, len(headers))])])


def snapkv() -> str:
    """What SnapKV finds, in the suite and in kvpress' own pipeline."""
    found: dict[str, list[tuple[float, str]]] = {}
    file = RESULTS / "snapkv" / "snapkv.csv"
    for _, cells in read_cells(file, ["variant", "right", "heads_with_number"], "scripts/snapkv.py writes it anew"):
        found.setdefault(cells["variant"], []).append((float(cells["right"]), cells["heads_with_number"]))
    lines = []
    for variant, answers in found.items():
        heads = [float(text) for _, text in answers if text]
        right = f"{sum(score for score, _ in answers):.0f} of {len(answers)}"
        lines.append([variant, right, percent(fmean(heads), 0) if heads else ""])
    return "\n".join(markdown_table(["", "passkeys", "heads that hold the whole number"], lines, right=[1, 2]))
