"""Run against run: what a second run changed, method by method, on the documents that both have answered.

The runs may be of two commits, precisions or machines. Everything that differs is named, since any of it may be the
reason. Rows of one method and budget are paired whatever its other settings are, where each run has one.

Differences are paired by document; intervals and p-values hold for all rows of one model, task and metric together, by
the procedure of the tables of a run (:mod:`bench.judge.family`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from statistics import fmean
from typing import Any, NamedTuple

from bench.judge.verdict import verdict
from bench.names import FULL, budget_text
from bench.records.differing import Term, differing
from bench.records.finished import BUDGET, Run, difference, members, same_cells
from bench.records.record import Record
from bench.records.row import Row
from bench.records.sample import Measured
from bench.records.shown import headline

Document = tuple[str, str]
"""Task and id of a document."""
OWN = ("quant_format", "window_size")
"""Settings of a method that samples have."""
SHOWN = ("model", "tasks", "methods", "full", "cache_size", "cache_ratio", "device", "dtype")
"""Settings that rows tell, or what came of them."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A row: what one cell scored in both runs, over the documents that both have answered."""

    run: str
    """The second run; the first is that of its :class:`Pair`."""
    row: Row
    """Of the first run."""
    cell: str
    """Of the second run."""
    settings: list[Term]
    """Of the method, where the two runs have others at the same budget: its format and its window."""
    n: int
    before: float
    now: float
    difference: float
    low: float | None = None
    high: float | None = None
    p_adjusted: float | None = None
    lost: int | None = None
    """Documents whose score fell; likewise those whose score rose."""
    found: int | None = None

    @property
    def said(self) -> str:
        """The verdict in words."""
        return verdict(self.difference, self.p_adjusted, higher_is_better=self.row.higher_is_better)


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
        for term in (*_asked(first.of_run, second.of_run), *differing(first.of_run, second.of_run))
    ]
    if said := _other_models(first, second):
        terms.insert(0, said)
    both = first.samples.values(), second.samples.values()
    # Where nothing else can be meant, other settings of a method are what was changed.
    cells = same_cells(*both, BUDGET) | same_cells(*both)
    sides = [_by_cell(run) for run in (first, second)]
    shifts: list[_Shift] = []
    notes: list[str] = []
    refused: dict[tuple[str, str], str | None] = {}
    for row in headline(first.rows):
        tasks = members(row.task, first.rows)
        before = _of(sides[0], row.model, row.cell, tasks)
        now = _of(sides[1], row.model, cells.get(row.cell, ""), tasks)
        shared = [document for document in before if document in now]
        if not shared:
            if before and now and (said := f"no document of {row.task}, {row.model}, in common") not in notes:
                notes.append(said)
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
        shift = _shift(row, {item: (before[item], now[item]) for item in shared})
        if shift is not None:
            shifts.append(shift)
    changes = _judged(shifts, second.name)
    notes += _alone(first, second, cells)
    if not changes:
        notes.append("nothing in common that could be compared")
    if len({change.n for change in changes}) > 1 or any(change.n < change.row.n for change in changes):
        notes.append("n: documents that both runs have answered, which scores and differences are over")
    return Pair(first=first.name, second=second.name, terms=terms, changes=changes, notes=notes)


def _other_models(first: Run, second: Run) -> str:
    """That the two have no model in common, so that nothing is compared; empty where they have, or one has none."""
    mine, others = (list(dict.fromkeys(row.model for row in run.rows)) for run in (first, second))
    if not mine or not others or not set(mine).isdisjoint(others):
        return ""
    return (
        f"model: {', '.join(mine)} in {first.name}, {', '.join(others)} in {second.name}; runs of different models are "
        "not compared"
    )


def _said(value: object) -> str:
    return "unknown" if value is None else str(value)


def _asked(first: Record, second: Record) -> list[Term]:
    """Settings that change answers, where the two were given others; what an older record does not have is unknown."""
    from bench.settings.fields import setting_of
    from bench.settings.run import RunConfig

    both = first.settings.keys() & second.settings.keys()
    names = [
        name
        for name, field in RunConfig.model_fields.items()
        if name in both and name not in SHOWN and setting_of(field).affects in ("answer", "grid")
    ]
    terms = [Term(name, *(_given(record.settings[name]) for record in (first, second))) for name in names]
    return [term for term in terms if term.first != term.second]


def _given(value: Any) -> str:
    if value is None:
        return "the default"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _alone(first: Run, second: Run, cells: Mapping[str, str]) -> list[str]:
    """The rows of the first run that no row of the second is paired with, and what it has of their methods instead."""
    lacking = _labels([row for row in first.rows if row.cell not in cells])
    having = _labels(second.rows)
    absent = sorted(lacking.keys() - having.keys())
    notes = [f"not in {second.name}: {', '.join(absent)}"] if absent else []
    return notes + [
        f"not paired: {method} {'; '.join(lacking[method])}, while {second.name} has "
        f"{method} {'; '.join(having[method])}: rows are paired by method and budget, where each run has one"
        for method in lacking
        if method in having
    ]


def _labels(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By method, each setting of it once."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        window = "" if row.window_size is None else f"(window {row.window_size})"
        budget = budget_text(row.budget_unit, row.cache_size, row.cache_ratio)
        found.setdefault(row.method, {})[" ".join(filter(None, (row.quant_format, budget, window)))] = None
    return {method: list(labels) for method, labels in found.items()}


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


class _Shift(NamedTuple):
    """What is known of a row in both runs, by document."""

    row: Row
    cell: str
    settings: list[Term]
    before: Mapping[Document, float]
    now: Mapping[Document, float]
    sources: Mapping[Document, object]


def _shift(row: Row, pairs: Mapping[Document, tuple[Measured, Measured]]) -> _Shift | None:
    """None for a score that single documents do not have, such as a perplexity, or that is 0 by definition."""
    before: dict[Document, float] = {}
    now: dict[Document, float] = {}
    for document, samples in pairs.items():
        for side, sample in zip((before, now), samples, strict=True):
            score = sample.scores.get(row.metric)
            if score is None or not isfinite(score):
                return None
            side[document] = score
    if row.method == FULL and not row.higher_is_better and not any(before.values()) and not any(now.values()):
        # The full cache's divergence from itself.
        return None
    sources = {
        item: item if old.source is None else (item[0], "source", old.source) for item, (old, _) in pairs.items()
    }
    mine, other = next(iter(pairs.values()))
    settings = [Term(name, getattr(mine, name), getattr(other, name)) for name in OWN]
    return _Shift(row, other.cell, [term for term in settings if term.first != term.second], before, now, sources)


def _sources_of(sources: Mapping[Document, object], documents: Iterable[Document]) -> list[object]:
    return [sources[document] for document in documents]


def _judged(shifts: Sequence[_Shift], name: str) -> list[Change]:
    """The changes, those of one model, task and metric as a family; in the order of the rows."""
    # SciPy, which tables of one run do without.
    from bench.judge.family import compare_over

    families: dict[tuple[str, str, str], list[int]] = {}
    for place, shift in enumerate(shifts):
        families.setdefault((shift.row.model, shift.row.task, shift.row.metric), []).append(place)
    found: dict[int, Change] = {}
    for places in families.values():
        mine = [shifts[place] for place in places]
        sources = {document: source for shift in mine for document, source in shift.sources.items()}
        row = mine[0].row
        tested = compare_over(
            [(shift.now, shift.before) for shift in mine],
            partial(_sources_of, sources),
            # What this run's scores are is no reason to take the other's for right or wrong.
            binary=False if row.binary is False else None,
            bounds=(
                -inf if row.metric_low is None else row.metric_low,
                inf if row.metric_high is None else row.metric_high,
            ),
        )
        for place, shift, item in zip(places, mine, tested, strict=True):
            low, high = item.interval or (None, None)
            sign = 1 if shift.row.higher_is_better else -1
            moved = [sign * (shift.now[document] - old) for document, old in shift.before.items()]
            found[place] = Change(
                run=name,
                row=shift.row,
                cell=shift.cell,
                settings=shift.settings,
                n=item.n,
                before=fmean(shift.before.values()),
                now=fmean(shift.now.values()),
                difference=item.difference,
                low=low,
                high=high,
                p_adjusted=item.p_adjusted,
                lost=sum(step < 0 for step in moved),
                found=sum(step > 0 for step in moved),
            )
    return [found[place] for place in sorted(found)]
