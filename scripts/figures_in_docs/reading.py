"""docs/reading.md: how often intervals hold, and SnapKV in two suites."""

from __future__ import annotations

import math
from statistics import fmean

from bench.records.files.csv_ import read_cells
from bench.records.files.markdown import markdown_table
from scripts.figures_in_docs.common import RESULTS, paragraph, percent


def coverage() -> str:
    """How often all intervals of simulated tables hold, and what is claimed to be detectable is found."""
    folder = RESULTS / "statistics"
    remedy = "scripts/coverage.py writes it anew"
    held: dict[tuple[str, str], dict[str, float]] = {}
    tables = set()
    for _, cells in read_cells(folder / "coverage.csv", ["scores", "documents", "rows", "held", "tables"], remedy):
        held.setdefault((cells["scores"], cells["rows"]), {})[cells["documents"]] = float(cells["held"])
        tables.add(int(cells["tables"]))
    counts = list(next(iter(held.values())))
    error = 100 * math.sqrt(0.95 * 0.05 / min(tables))
    headers = ["scores", "rows", *(f"n={count}" for count in counts)]
    lines = [[*key, *(f"{100 * found[count]:.1f}" for count in counts)] for key, found in held.items()]
    attained: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    told: dict[tuple[str, str], list[float]] = {}
    few = 0
    needed = ["full", "method", "documents", "rows", "design", "held", "told", "tables"]
    for _, cells in read_cells(folder / "attainable.csv", needed, remedy):
        truth = f"{float(cells['full']):.0%} and {float(cells['method']):.0%}" if cells["full"] else "drawn"
        column, few = (cells["documents"], cells["design"]), int(cells["tables"])
        attained.setdefault((truth.replace("%", " %"), cells["rows"]), {})[column] = float(cells["held"])
        if cells["full"] != cells["method"]:
            told.setdefault(column, []).append(float(cells["told"]))
    columns = list(next(iter(attained.values())))
    attainable = [[*key, *(f"{100 * found[column]:.1f}" for column in columns)] for key, found in attained.items()]
    lowest = [min(found[column] for found in attained.values()) for column in columns]
    attainable.append(["lowest of these", "", *(f"{100 * share:.1f}" for share in lowest)])
    attainable.append(["rows told from full", "", *(f"{100 * fmean(told[column]):.1f}" for column in columns)])
    others: dict[tuple[str, str, str], dict[str, float]] = {}
    for _, cells in read_cells(folder / "designs.csv", ["scores", "documents", "rows", "design", "held"], remedy):
        key = cells["scores"], cells["documents"], cells["rows"]
        others.setdefault(key, {})[cells["design"]] = float(cells["held"])
    ways = list(next(iter(others.values())))
    judged = [[*key, *(f"{100 * found[way]:.1f}" for way in ways)] for key, found in others.items()]
    power: dict[tuple[str, str, str], dict[str, str]] = {}
    for _, cells in read_cells(folder / "power.csv", ["scores", "documents", "rows", "direction", "power"], remedy):
        share = cells["power"] and f"{100 * float(cells['power']):.0f}"
        key = cells["scores"], cells["rows"], "rise" if cells["direction"] == "1" else "fall"
        power.setdefault(key, {})[cells["documents"]] = share
    powers = [[*key, *(found[count] or "none" for count in counts)] for key, found in power.items()]
    within = [value for found in held.values() for value in found.values()]
    return "\n".join(
        [
            paragraph(
                f"""Percent of {min(tables):,} simulated tables in which *every* interval of a difference to `full`
                holds the true one, by what the scores are like, the rows of the table and the documents
                (`scripts/coverage.py`, `results/statistics`). Asked are 95; the error of each share is about
                {error:.0f}. The lowest is {100 * min(within):.1f}; where few documents say little, intervals are
                rather too wide:"""
            ),
            "",
            *markdown_table(headers, lines, right=range(1, len(headers))),
            "",
            paragraph(
                f"""Of few right and wrong answers no interval holds in 95 % of the tables *whatever is true*, since
                few counts are possible. The same of {few} tables by what the full cache and the methods truly get
                right, with 8 and 20 documents, of four ways to judge them: *counted*, which tables use, mid-p of what
                was counted, at a level that turned signs give; the same at the level of a normal distribution with the
                rows' correlation; *score*, Tango's intervals at that level; and these with ends 0.9 as many standard
                errors away. *Drawn* are truths that differ from table to table, of the full cache from 50 to 100 %, of
                each method from a fifth to all of these: what is to be expected of tables whose truth is not known.
                The last line is the mean share of rows that are told from `full`, of truths in which they differ from
                it:"""
            ),
            "",
            *markdown_table(
                ["full and methods", "rows", *(f"n={n}, {design}" for n, design in columns)],
                attainable,
                right=range(1, len(columns) + 2),
            ),
            "",
            paragraph(
                """Other scores of 8 documents, as they are judged, and by the bootstrap-t with Student's ends where
                these are further out, whatever the scores are like: at the level that resamples give, and at that of
                independent rows:"""
            ),
            "",
            *markdown_table(["scores", "n", "rows", *ways], judged, right=range(1, len(ways) + 3)),
            "",
            paragraph(
                """Percent of simulated runs in which the smallest difference that a table states is found; asked are
                80. Right and wrong are of as many unrelated rows; of other scores the documents are typical of their
                shape: of single random samples it is found less often. None is stated of fewer than 30 documents with
                skewed scores:"""
            ),
            "",
            *markdown_table(["scores", "rows", "true", *headers[2:]], powers, right=[1, *range(3, len(headers) + 1)]),
        ]
    )


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
