"""Run against run: what a second run changed, method by method, on the documents that both have answered.

The runs may be of two commits, precisions or machines. Everything that differs is named, since any of it may be the
reason. Differences are paired by document; their p-values are adjusted (Holm) over the rows of one model, task and
metric, as in the tables of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from statistics import fmean

from bench.judge.verdict import verdict
from bench.names import FULL, LEAST_DOCUMENTS
from bench.records.differing import differing
from bench.records.finished import Run, difference, members, same_cells
from bench.records.row import Row
from bench.records.sample import Measured
from bench.records.shown import headline

Document = tuple[str, str]
"""Task and id of a document."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A row: what one cell scored in both runs, over the documents that both have answered."""

    run: str
    """The second run; the first is that of its :class:`Pair`."""
    row: Row
    """Of the first run."""
    cell: str
    """Of the second run."""
    n: int
    before: float
    now: float
    difference: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    lost: int | None = None
    """Documents whose score fell; likewise those whose score rose."""
    found: int | None = None

    @property
    def said(self) -> str:
        """The verdict in words."""
        return verdict(self.difference, self.p_holm, higher_is_better=self.row.higher_is_better)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs beside each other."""

    first: str
    second: str
    terms: list[str]
    """Everything that differs."""
    changes: list[Change]
    notes: list[str] = field(default_factory=list)
    """What could not be compared, and why."""

    @property
    def title(self) -> str:
        return f"{self.second} against {self.first}"


def between(runs: Sequence[Run]) -> list[Pair]:
    """Each further run against the first one."""
    known = [run for run in runs if run.is_run]
    return [_pair(known[0], other) for other in known[1:]]


def _pair(first: Run, second: Run) -> Pair:
    terms = [
        f"{term.name}: {_said(term.first)} in {first.name}, {_said(term.second)} in {second.name}"
        for term in differing(first.of_run, second.of_run)
    ]
    cells = same_cells(first.samples.values(), second.samples.values())
    sides = [_by_cell(run) for run in (first, second)]
    changes: list[Change] = []
    notes: list[str] = []
    refused: dict[tuple[str, str], str | None] = {}
    for row in headline(first.rows):
        tasks = members(row.task, first.rows)
        before = _of(sides[0], row.model, row.cell, tasks)
        now = _of(sides[1], row.model, cells.get(row.cell, ""), tasks)
        shared = [document for document in before if document in now]
        if not shared:
            continue
        for task in tasks:
            if (row.model, task) not in refused:
                documents = {document for of, document in shared if of == task}
                reason = difference(first, second, row.model, task, documents) if documents else None
                refused[row.model, task] = reason
                if reason:
                    notes.append(f"not compared on {task}, {row.model}: {reason}")
        if any(refused[row.model, task] for task in tasks):
            continue
        change = _change(row, second.name, cells[row.cell], [(before[item], now[item]) for item in shared])
        if change is not None:
            changes.append(change)
    if lacking := sorted({row.method for row in first.rows if row.cell not in cells}):
        notes.append(f"not in {second.name}: {', '.join(lacking)}")
    if not changes:
        notes.append("nothing in common that could be compared")
    if len({change.n for change in changes}) > 1 or any(change.n < change.row.n for change in changes):
        notes.append("n: documents that both runs have answered, which scores and differences are over")
    return Pair(first=first.name, second=second.name, terms=terms, changes=_adjusted(changes), notes=notes)


def _said(value: object) -> str:
    return "unknown" if value is None else str(value)


def _by_cell(run: Run) -> dict[tuple[str, str], dict[Document, Measured]]:
    """The newest sample of each document, by model and cell."""
    found: dict[tuple[str, str], dict[Document, Measured]] = {}
    for sample in run.samples.values():
        found.setdefault((sample.model, sample.cell), {})[sample.task, sample.document] = sample
    return found


def _of(
    side: Mapping[tuple[str, str], Mapping[Document, Measured]], model: str, cell: str, tasks: set[str]
) -> dict[Document, Measured]:
    return {key: sample for key, sample in side.get((model, cell), {}).items() if key[0] in tasks}


def _change(row: Row, name: str, cell: str, pairs: Sequence[tuple[Measured, Measured]]) -> Change | None:
    """None for a score that single documents do not have, such as a perplexity, or that is 0 by definition."""
    # SciPy, which tables of one run do without.
    from bench.judge.family import compare

    scores = [(old.scores.get(row.metric), new.scores.get(row.metric)) for old, new in pairs]
    known = [(old, new) for old, new in scores if old is not None and new is not None]
    if len(known) < len(scores) or not all(isfinite(value) for pair in known for value in pair):
        return None
    before, now = [old for old, _ in known], [new for _, new in known]
    if row.method == FULL and not row.higher_is_better and not any(before) and not any(now):
        # The full cache's divergence from itself.
        return None
    tested = compare(now, before)
    low, high = tested.interval or (None, None)
    sign = 1 if row.higher_is_better else -1
    return Change(
        run=name,
        row=row,
        cell=cell,
        n=len(known),
        before=fmean(before),
        now=fmean(now),
        difference=tested.difference,
        low=low,
        high=high,
        p_value=tested.p_value if len(known) >= LEAST_DOCUMENTS else None,
        lost=sum(sign * (new - old) < 0 for old, new in known),
        found=sum(sign * (new - old) > 0 for old, new in known),
    )


def _adjusted(changes: Sequence[Change]) -> list[Change]:
    from bench.judge.stats import holm

    families: dict[tuple[str, str, str], list[int]] = {}
    for place, change in enumerate(changes):
        if change.p_value is not None:
            families.setdefault((change.row.model, change.row.task, change.row.metric), []).append(place)
    found = list(changes)
    for places in families.values():
        p_values = [p for place in places if (p := changes[place].p_value) is not None]
        for place, p_holm in zip(places, holm(p_values), strict=True):
            found[place] = replace(found[place], p_holm=p_holm)
    return found
