"""The regression gate: a run beside a baseline, document by document.

Both have answered the same documents, so every quantity is compared in pairs and its change has a 95 % interval over
documents (:mod:`bench.judge.stats`). A quantity has become *worse* where the whole interval lies beyond the tolerance:
what noise can explain passes, and so does what is smaller than the tolerance, however sure it is. Of fewer documents
than an interval needs, every single one must be worse.

Answers that are right or wrong are counted beside that: one that was right and is wrong now is a change, not noise,
since the same prompt is decoded greedily. Only where sums are rounded in another way, on other hardware or with other
versions, may a few be lost (:data:`bench.gate.findings.LOST_ELSEWHERE`). Sampled answers are not counted so.

Speed is never compared in seconds. Each document was decoded by ``full`` and by the method, one right after the other;
the ratio of the two belongs to the document, and what is compared is that ratio, on a logarithmic scale. Times are now
and then far off, so their change is a Hodges-Lehmann estimate (:func:`bench.judge.stats.pseudomedian`), not a mean.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.errors import UserError
from bench.gate.findings import (
    DIVERGENCE,
    DIVERGENCE_ELSEWHERE,
    LEAST_TOLERANCE,
    LOST_ELSEWHERE,
    MISSING,
    NEW,
    OK,
    OTHER_MACHINE,
    SAME_MACHINE,
    SKIPPED,
    Finding,
    Report,
    Tolerances,
)
from bench.gate.judging import Document, best_of, bytes_finding, lost_finding, score_finding, speed_finding
from bench.gate.reading import read
from bench.names import FULL, RECORD, RESULTS
from bench.records.differing import Term, differing, rounding
from bench.records.files.text import printable
from bench.records.finished import Run, difference, members, same_cells
from bench.records.row import Row
from bench.records.sample import Measured
from bench.records.shown import headline


class _Side:
    """The samples of a run or a baseline, by what they are compared by."""

    def __init__(self, run: Run) -> None:
        self.rows = {(row.model, row.task, row.metric, row.cell): row for row in run.rows}
        self.by_cell: dict[tuple[str, str], dict[Document, Measured]] = {}
        for sample in run.samples.values():
            mine = self.by_cell.setdefault((sample.model, sample.cell), {})
            mine[sample.task, sample.document] = sample
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
    same = same_cells(baseline.samples.values(), run.samples.values())
    elsewhere = rounding(baseline.of_run, run.of_run)
    if tolerances.lost is None:
        tolerances = replace(tolerances, lost=LOST_ELSEWHERE if elsewhere else 0.0)
    if tolerances.divergence is None:
        tolerances = replace(tolerances, divergence=DIVERGENCE_ELSEWHERE if elsewhere else DIVERGENCE)
    findings: list[Finding] = []
    notes = [f"{side.name} has not ended" for side in (run, baseline) if not side.of_run.finished]
    for row in headline(baseline.rows):
        found, lost = _of_row(row, baseline.rows, mine, other, same, tolerances)
        findings += found
        notes += lost
    notes += [_said(term) for term in differing(baseline.of_run, run.of_run)]
    if any(sample.repeat is not None for sample in baseline.samples.values()):
        notes.append(
            "answers are sampled: a right one that is lost is no change by itself, and is not counted; scores are "
            "compared by their means over the repeats of each document"
        )
    if elsewhere:
        notes.append(_explained(elsewhere, tolerances))
    instructions = next((term for term in elsewhere if term.name == "instructions"), None)
    if not tolerances.judge_speed:
        notes.append("speed is not judged")
    elif instructions is not None:
        # What a cache gains over the full one depends on the kernels that the instructions allow.
        notes.append(f"speed is not judged: {_said(instructions)}")
    else:
        tolerance = tolerances.speed
        if tolerance is None:
            same_machine = run.of_run.hardware == baseline.of_run.hardware
            tolerance = SAME_MACHINE if same_machine else OTHER_MACHINE
        for model, cell in other.by_cell:
            if cell != FULL and cell in same and (model, same[cell]) in mine.by_cell:
                now, before = mine.of_both(model, same[cell]), other.of_both(model, cell)
                findings.append(speed_finding(model, other.label(cell), now, before, tolerance))
    for model, cell in mine.by_cell:
        if cell not in same.values():
            findings.append(
                Finding(outcome=NEW, model=model, what="", cell=mine.label(cell), note="not in the baseline")
            )
    for cell, twin in same.items():
        if cell != twin:
            notes.append(f"{other.label(cell)}: other settings of the method than in the baseline")
    if partial:
        findings = [replace(item, outcome=SKIPPED) if item.outcome == MISSING else item for item in findings]
    for failure in run.of_run.failures:
        where = ", ".join(filter(None, (failure.task, failure.cell, failure.document)))
        notes.append(f"failed in the run: {where}: {failure.error}")
    return Report(findings=findings, notes=notes)


def changes(run: Path, baseline: Path) -> list[str]:
    """What a new baseline changes: terms, lost answers, what became worse; nothing where there was no baseline.

    Raises:
        UserError: the run is damaged.
    """
    if not (baseline / RECORD).is_file():
        return []
    now = read(run)
    try:
        report = check(now, read(baseline), Tolerances(judge_speed=False), partial=True)
    except UserError as error:
        return [f"not compared with the baseline before: {error}"]
    beyond = [item for item in report.findings if item.outcome not in (OK, SKIPPED)]
    return [
        *(printable(f"{item.outcome}: {item.what}, {item.cell}: {item.baseline} -> {item.run}") for item in beyond),
        *map(printable, report.notes),
    ]


def _refuse_others(run: Run, baseline: Run, shared: set[tuple[str, str, str]]) -> None:
    """Raises :class:`UserError` (exit code 2) where the two have answered other questions."""
    pairs = sorted({(model, task) for model, task, _ in shared})
    if not pairs:
        asked = [sorted({(task, model) for model, task, *_ in side.samples}) for side in (run, baseline)]
        both = [pair for pair in asked[0] if pair in asked[1]]
        what = ", and ".join(map(_named, asked))
        if both:
            first = next(item.document for item in run.samples.values() if (item.task, item.model) in both)
            what = f"other documents of {_named(both)}, first {first}"
        raise UserError(f"{run.name} and {baseline.name} have nothing in common: {what}", exit_code=2)
    for model, task in pairs:
        documents = {document for *of, document in shared if of == [model, task]}
        if reason := difference(run, baseline, model, task, documents):
            raise UserError(
                f"{run.name} and {baseline.name} must not be compared on {task}, {model}: {reason}", exit_code=2
            )


def _named(asked: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{task} on {model}" for task, model in asked)


def _said(term: Term) -> str:
    return f"{term.name}: {term.first} in the baseline, now {term.second}"


def _explained(elsewhere: Sequence[Term], tolerances: Tolerances) -> str:
    """What may be concluded where the terms are other ones."""
    names = ", ".join(term.name for term in elsewhere)
    return (
        f"sums are rounded in another way than in the baseline ({names}): up to {100 * (tolerances.lost or 0.0):g} % "
        "of the right answers, rounded up, may be lost, and divergences may grow by "
        f"{100 * (tolerances.divergence or 0.0):g} %. Either can be of rounding or of a change; to tell them apart run "
        "the baseline's commit here"
    )


def _right_or_wrong(row: Row, tasks: Container[str], *sides: _Side) -> bool:
    """Whether the metric knows right and wrong only, by the scores of all cells of both sides."""
    return (
        best_of(
            score
            for side in sides
            for (model, _), samples in side.by_cell.items()
            if model == row.model
            for (task, _), sample in samples.items()
            if task in tasks and (score := sample.scores.get(row.metric)) is not None
        )
        is not None
    )


def _of_row(
    row: Row, rows: Sequence[Row], mine: _Side, other: _Side, same: Mapping[str, str], tolerances: Tolerances
) -> tuple[list[Finding], list[str]]:
    """What a row of the baseline's ``results.csv`` is compared with, and a line that names the answers that were lost.

    Bytes stand with a task's first metric.
    """
    model, task, metric, cell = row.model, row.task, row.metric, row.cell
    tasks = members(task, rows)
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
    lines: list[str] = []
    if not documents:
        return findings, lines
    share = tolerances.score if row.higher_is_better else tolerances.divergence or 0.0
    scores = [(now[item].scores.get(metric), before[item].scores.get(metric)) for item in documents]
    values = [(new, old) for new, old in scores if new is not None and old is not None]
    sampled = any(before[item].repeat is not None for item in documents)
    if sampled and len(values) < len(scores):
        # pass@k is of the same answers as the mean over them.
        return findings, lines
    if len(values) < len(scores):
        # No mean over documents, such as a corpus' perplexity: one number against another.
        found = mine.rows.get((model, task, metric, same[cell]))
        if found is None or found.n != row.n:
            findings.append(Finding(outcome=MISSING, what=what, **named, note="not over all documents"))
            values = []
        else:
            values = [(found.score, row.score)]
    if sampled and len(values) == len(documents):
        # The answers to one document rise and fall together.
        means: dict[Document, list[tuple[float, float]]] = {}
        for item, pair in zip(documents, values, strict=True):
            means.setdefault((item[0], before[item].own_id), []).append(pair)
        values = [(fmean(new for new, _ in pairs), fmean(old for _, old in pairs)) for pairs in means.values()]
    if values:
        level = fmean(old for _, old in values)
        tolerance = max(share * abs(level), LEAST_TOLERANCE)
        findings.append(score_finding(what, named, values, tolerance, row))
    # An answer that was right and has no score any more is lost, too.
    answers = {
        document: (new or 0.0, old) for document, (new, old) in zip(documents, scores, strict=True) if old is not None
    }
    if row.higher_is_better and answers and not sampled and _right_or_wrong(row, tasks, mine, other):
        finding, lost = lost_finding(f"{what}, right answers", named, answers, tolerances.lost or 0.0)
        findings.append(finding)
        if lost:
            several = len(tasks) > 1
            listed = ", ".join(f"{of} {document}" if several else document for of, document in lost)
            lines.append(f"lost: {what}, {other.label(cell)}: {listed}")
    documents = [item for item in documents if before[item].kv_bytes and now[item].full_kv_bytes]
    if metric == first and documents:
        findings.append(bytes_finding(f"{task} KV bytes", named, now, before, documents, tolerances.kv_bytes))
    return findings, lines
