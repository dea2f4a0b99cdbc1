"""The regression gate: a run beside a baseline, document by document.

Both have answered the same documents, so every quantity is compared in pairs and its change has a 95 % interval over
documents (:mod:`bench.judge.stats`). A quantity has become *worse* where the whole interval lies beyond the tolerance:
what noise can explain passes, and so does what is smaller than the tolerance, however sure it is. Of fewer documents
than an interval needs, every single one must be worse.

Speed is never compared in seconds. Each document was decoded by ``full`` and by the method, one right after the other;
the ratio of the two belongs to the document, and what is compared is that ratio, on a logarithmic scale. Times are now
and then far off, so their change is a Hodges-Lehmann estimate (:func:`bench.judge.stats.pseudomedian`), not a mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from bench.errors import UserError
from bench.gate.findings import (
    LEAST_TOLERANCE,
    MISSING,
    NEW,
    OPEN,
    OTHER_MACHINE,
    SAME_MACHINE,
    Finding,
    Report,
    Tolerances,
)
from bench.gate.judging import Document, bytes_finding, score_finding, speed_finding
from bench.names import FULL, RESULTS
from bench.records.finished import Run, difference
from bench.records.record import ModelRecord
from bench.records.row import Row
from bench.records.sample import Measured
from bench.records.shown import headline

IDENTITY = ("method", "quant_format", "budget_unit", "cache_size", "cache_ratio", "window_size")


class _Side:
    """The samples of a run or a baseline, by what they are compared by."""

    def __init__(self, run: Run) -> None:
        self.rows = {(row.model, row.task, row.metric, row.cell): row for row in run.rows}
        self.by_cell: dict[tuple[str, str], dict[Document, Measured]] = {}
        self.identities: dict[str, tuple[Any, ...]] = {}
        for sample in run.samples.values():
            mine = self.by_cell.setdefault((sample.model, sample.cell), {})
            mine[sample.task, sample.document] = sample
            self.identities[sample.cell] = tuple(getattr(sample, name) for name in IDENTITY)
        self.labels: Mapping[str, str] = run.of_run.cells

    def label(self, cell: str) -> str:
        return self.labels.get(cell, cell)

    def of(self, model: str, cell: str, tasks: set[str]) -> dict[Document, Measured]:
        return {key: item for key, item in self.by_cell.get((model, cell), {}).items() if key[0] in tasks}

    def of_both(self, model: str, cell: str) -> list[tuple[Document, Measured, Measured]]:
        """The documents that ``full`` and the cell have answered in one start of the run, with the samples of the two.

        Times of two starts may be of two machines.
        """
        full = self.by_cell.get((model, FULL), {})
        return [
            (document, full[document], sample)
            for document, sample in self.by_cell[model, cell].items()
            if document in full and full[document].start == sample.start
        ]


def _same_cells(run: _Side, baseline: _Side) -> dict[str, str]:
    """The run's cell for each of the baseline's: the same settings, or else the only one of that method and budget."""
    found = {cell: cell for cell in baseline.identities if cell in run.identities}
    counts = Counter(baseline.identities.values()), Counter(run.identities.values())
    for cell, identity in baseline.identities.items():
        if cell not in found and counts[0][identity] == counts[1][identity] == 1:
            found[cell] = next(other for other, mine in run.identities.items() if mine == identity)
    return found


def check(run: Run, baseline: Run, tolerances: Tolerances, *, partial: bool = False) -> Report:
    """Compare ``run`` with ``baseline``.

    Args:
        partial: let pass what the baseline has and the run has not measured.

    Raises:
        UserError: another model or other data, or an empty baseline: nothing can be said.
    """
    if not baseline.rows:
        raise UserError(f"{baseline.name} has no {RESULTS}: no task of it has ended, so there is nothing to check")
    shared = {(model, task, document) for model, task, document, *_ in run.samples}
    shared &= {(model, task, document) for model, task, document, *_ in baseline.samples}
    _refuse_others(run, baseline, shared)
    mine, other = _Side(run), _Side(baseline)
    same = _same_cells(mine, other)
    findings: list[Finding] = []
    for row in headline(baseline.rows):
        findings += _of_row(row, baseline.rows, mine, other, same, tolerances)
    notes = [f"{side.name} has not ended" for side in (run, baseline) if not side.of_run.finished]
    notes += _other_terms(run, baseline)
    if tolerances.judge_speed:
        tolerance = tolerances.speed
        if tolerance is None:
            same_machine = run.of_run.hardware == baseline.of_run.hardware
            tolerance = SAME_MACHINE if same_machine else OTHER_MACHINE
        for model, cell in other.by_cell:
            if cell != FULL and cell in same and (model, same[cell]) in mine.by_cell:
                now, before = mine.of_both(model, same[cell]), other.of_both(model, cell)
                findings.append(speed_finding(model, other.label(cell), now, before, tolerance))
    else:
        notes.append("speed is not judged")
    for model, cell in mine.by_cell:
        if cell not in same.values():
            findings.append(
                Finding(outcome=NEW, model=model, what="", cell=mine.label(cell), note="not in the baseline")
            )
    for cell, twin in same.items():
        if cell != twin:
            notes.append(f"{other.label(cell)}: other settings of the method than in the baseline")
    if partial:
        findings = [replace(item, outcome=OPEN) if item.outcome == MISSING else item for item in findings]
    for failure in run.of_run.failures:
        where = ", ".join(filter(None, (failure.task, failure.cell, failure.document)))
        notes.append(f"failed in the run: {where}: {failure.error}")
    return Report(findings=findings, notes=notes)


def _refuse_others(run: Run, baseline: Run, shared: set[tuple[str, str, str]]) -> None:
    """Raises :class:`UserError` (exit code 2) where the two have answered other questions."""
    pairs = sorted({(model, task) for model, task, _ in shared})
    if not pairs:
        asked = [
            "; ".join(sorted({f"{task} on {model}" for model, task, *_ in side.samples})) for side in (run, baseline)
        ]
        what = f"{asked[0]}, and {asked[1]}" if asked[0] != asked[1] else f"other documents of {asked[0]}"
        raise UserError(f"{run.name} and {baseline.name} have nothing in common: {what}", exit_code=2)
    for model, task in pairs:
        documents = {document for *of, document in shared if of == [model, task]}
        if reason := difference(run, baseline, model, task, documents):
            raise UserError(
                f"{run.name} and {baseline.name} must not be compared on {task}, {model}: {reason}", exit_code=2
            )


def _other_terms(run: Run, baseline: Run) -> list[str]:
    """Versions, precision and machine, where they differ."""
    here, there = run.of_run, baseline.of_run
    terms: list[tuple[str, Any, Any]] = []
    for new, old in ((here.packages, there.packages), (here.hardware, there.hardware)):
        terms += [(name, old.get(name), new.get(name)) for name in sorted({*new, *old})]
    for model, mine in here.models.items():
        other = there.models.get(model, ModelRecord())
        terms += [(f"dtype of {model}", other.dtype, mine.dtype), (f"device of {model}", other.device, mine.device)]
    return [f"{name}: {old} in the baseline, now {new}" for name, old, new in terms if old != new]


def _members(task: str, rows: Iterable[Row]) -> set[str]:
    """The task, or all that were asked for through the group of that name."""
    parts = {row.task for row in rows if row.part_of == task and row.task != task}
    return {task}.union(*(_members(part, rows) for part in parts))


def _of_row(
    row: Row, rows: Sequence[Row], mine: _Side, other: _Side, same: Mapping[str, str], tolerances: Tolerances
) -> list[Finding]:
    """What a row of the baseline's ``results.csv`` is compared with; bytes stand with a task's first metric."""
    model, task, metric, cell = row.model, row.task, row.metric, row.cell
    tasks = _members(task, rows)
    named: dict[str, Any] = {"model": model, "cell": other.label(cell)}
    what = f"{task} {metric}"
    before = other.of(model, cell, tasks)
    now = mine.of(model, same[cell], tasks) if cell in same else {}
    documents = [document for document in before if document in now]
    first = next(item.metric for item in rows if (item.model, item.task, item.cell) == (model, task, cell))
    findings = []
    if metric == first and (not documents or len(documents) < len(before)):
        note = f"{len(documents)} of {len(before)} documents measured"
        findings.append(Finding(outcome=MISSING, what=task, **named, note=note))
    if not documents:
        return findings
    share = tolerances.score if row.higher_is_better else tolerances.divergence
    scores = [(now[item].scores.get(metric), before[item].scores.get(metric)) for item in documents]
    values = [(new, old) for new, old in scores if new is not None and old is not None]
    if len(values) < len(scores):
        # No mean over documents, such as a corpus' perplexity: one number against another.
        found = mine.rows.get((model, task, metric, same[cell]))
        if found is None or found.n != row.n:
            findings.append(Finding(outcome=MISSING, what=what, **named, note="not over all documents"))
            values = []
        else:
            values = [(found.score, row.score)]
    if values:
        level = fmean(old for _, old in values)
        tolerance = max(share * abs(level), LEAST_TOLERANCE)
        findings.append(score_finding(what, named, values, tolerance, higher_is_better=row.higher_is_better))
    documents = [item for item in documents if before[item].kv_bytes and now[item].full_kv_bytes]
    if metric == first and documents:
        findings.append(bytes_finding(f"{task} KV bytes", named, now, before, documents, tolerances.kv_bytes))
    return findings
