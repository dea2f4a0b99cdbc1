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

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.errors import UserError
from bench.judge.stats import Interval, difference_interval, pseudomedian
from bench.names import FULL, LEAST_DOCUMENTS
from bench.report.rows import Row, headline, read_results
from bench.report.runs import Run, difference
from bench.report.wording import bytes_text, percent_text, score_text
from bench.report.writing import in_markdown
from bench.runs.folder import RECORD, RESULTS, SAMPLES, read_record, read_samples, write_atomic

Sample = Mapping[str, Any]
Document = tuple[str, str]
"""Task and id of a document."""

OK, WORSE, BETTER, MISSING, NEW, OPEN = "ok", "worse", "better", "missing", "new", "open"
FAILING = (WORSE, MISSING)

SAME_MACHINE, OTHER_MACHINE = 0.03, 0.25
"""Tolerances of speed. On other hardware the ratio of two methods is another one."""
LEAST_TOLERANCE = 1e-3
"""Of a score or divergence, whatever its size: what another order of additions makes of bfloat16."""

IDENTITY = ("method", "quant_format", "budget_unit", "cache_size", "cache_ratio", "window_size")
NEEDED = (
    *("model", "task", "document", "prompt_sha256", "cell", "truncated", *IDENTITY, "scores", "kv_bytes"),
    *("full_kv_bytes", "tpot_ms", "decode_s", "scored_tokens"),
)
"""What the gate reads of a sample."""
ANSWER: dict[str, Any] = {
    "text": None,
    "token_ids": None,
    "log_likelihoods": None,
    "compared": None,
    "reference": None,
    "info": {},
}
"""What a baseline leaves out of a sample: it is compared by scores, and must be small enough for a repository."""


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """How much worse passes although it is beyond noise."""

    score: float = 0.02
    """Share of the baseline's score, where more is better."""
    divergence: float = 0.05
    """Share of the baseline's KL divergence, perplexity or other metric where less is better."""
    kv_bytes: float = 0.01
    """Share of the baseline's bytes."""
    speed: float | None = None
    """Share of the baseline's tokens/s over those of ``full``; None: by whether the machine is the baseline's."""
    judge_speed: bool = True

    def __post_init__(self) -> None:
        for name in ("score", "divergence", "kv_bytes", "speed"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise UserError(f"tolerance of {name}: {value} is no share of 0 or more, below 1", exit_code=2)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the gate: what was compared, and what came out."""

    outcome: str
    """One of :data:`OK`, :data:`WORSE`, :data:`BETTER`, :data:`MISSING`, :data:`NEW`, and :data:`OPEN` where nothing
    can be said."""
    model: str
    what: str
    """Task and metric, task and bytes, or speed."""
    cell: str
    """The method with its budget."""
    baseline: str = ""
    run: str = ""
    change: str = ""
    """With its interval and the tolerance."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the gate found."""

    findings: list[Finding]
    notes: list[str]
    """What else is different between the run and the baseline."""

    @property
    def failed(self) -> bool:
        """Whether anything became worse or is missing."""
        return any(finding.outcome in FAILING for finding in self.findings)


# --- Reading and writing ---


def read(path: Path) -> Run:
    """A run or a baseline, as far as there is any: a run that was stopped may have samples and no results.

    Raises:
        UserError: no run folder, a damaged file in it, or samples of another version of the suite.
    """
    record = read_record(path)
    samples = read_samples(path / SAMPLES)
    for sample in samples:
        lacking = [name for name in NEEDED if not isinstance(sample, dict) or name not in sample]
        if lacking:
            raise UserError(f"{path / SAMPLES}: a sample has no {lacking[0]!r}; it is of another version")
    if not samples:
        raise UserError(f"{path} has no samples: nothing has been measured there")
    rows = read_results(path) if (path / RESULTS).is_file() else []
    return Run(name=str(path), rows=rows, record=record, samples=samples)


def write_baseline(run: Path, baseline: Path) -> int:
    """Make ``run`` the baseline, in the place of one that is there. Returns its size in bytes.

    The new folder is complete before it takes the old one's place, so that none is ever half of each.

    Raises:
        UserError: the run is not whole, or the folder holds something else.
    """
    found = read(run)
    record = dict(found.record or {})
    if not record.get("finished") or not found.rows or record.get("failures"):
        what = "has failures" if record.get("failures") else "has not ended"
        raise UserError(f"{run} {what}: a baseline must be whole; run its command again")
    baseline = baseline.resolve()
    if run.resolve() == baseline:
        raise UserError(f"--against {baseline}: that is the run itself; give the baseline a folder of its own", 2)
    if baseline.is_dir():
        if others := sorted({item.name for item in baseline.iterdir()} - {RECORD, RESULTS, SAMPLES}):
            raise UserError(f"--against {baseline}: holds more than a baseline ({others[0]}): give another folder", 2)
    elif baseline.exists():
        raise UserError(f"--against {baseline}: is no folder", 2)
    record["fingerprint"] = {**record["fingerprint"], "baseline": True}
    new, old = (baseline.with_name(f".{baseline.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        new.mkdir(parents=True)
        lines = (json.dumps(_rounded({**sample, **ANSWER}), ensure_ascii=False) for sample in found.samples)
        write_atomic(new / SAMPLES, "".join(f"{line}\n" for line in lines))
        write_atomic(new / RESULTS, (run / RESULTS).read_text(encoding="utf-8"))
        write_atomic(new / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        if baseline.is_dir():
            baseline.rename(old)
        new.rename(baseline)
    except OSError as error:
        if old.is_dir():
            old.rename(baseline)
        raise UserError(f"--against {baseline}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return sum(item.stat().st_size for item in baseline.iterdir())


def _rounded(value: Any) -> Any:
    """Floats of six digits, as ``results.csv`` has them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


# --- The comparison of one quantity ---


def judge(
    run: Sequence[float], baseline: Sequence[float], tolerance: float, *, higher_is_better: bool
) -> tuple[str, float, Interval | None]:
    """The outcome, the mean change and its interval, None for too few documents.

    Args:
        run: one value per document.
        baseline: of the same documents.
        tolerance: how much worse passes, in the values' unit.
    """
    changes = [new - old for new, old in zip(run, baseline, strict=True)]
    mean = fmean(changes)
    interval = None
    if len(changes) >= LEAST_DOCUMENTS:
        # No interval where every document changed by the same: then there is nothing to be unsure of.
        interval = difference_interval(run, baseline) or Interval(mean, mean)
    ends = interval or Interval(min(changes), max(changes))
    return _outcome(ends, tolerance, higher_is_better=higher_is_better), mean, interval


def _outcome(ends: Interval, tolerance: float, *, higher_is_better: bool) -> str:
    low, high = ends if higher_is_better else (-ends.high, -ends.low)
    return WORSE if high < -tolerance else BETTER if low > tolerance else OK


def _step_ms(sample: Sample) -> float | None:
    """Milliseconds per token that was generated, or read to be scored."""
    if sample["tpot_ms"] is not None:
        return float(sample["tpot_ms"])
    tokens = sample["scored_tokens"]
    return 1000.0 * sample["decode_s"] / tokens if tokens and sample["decode_s"] else None


# --- Run and baseline ---


class _Side:
    """The samples of a run or a baseline, by what they are compared by."""

    def __init__(self, run: Run) -> None:
        self.rows = {(row["model"], row["task"], row["metric"], row["cell"]): row for row in run.rows}
        self.by_cell: dict[tuple[str, str], dict[Document, Sample]] = {}
        self.identities: dict[str, tuple[Any, ...]] = {}
        for sample in run.samples:
            mine = self.by_cell.setdefault((sample["model"], sample["cell"]), {})
            mine[sample["task"], sample["document"]] = sample
            self.identities[sample["cell"]] = tuple(sample[name] for name in IDENTITY)
        self.labels: Mapping[str, str] = (run.record or {}).get("cells", {})

    def label(self, cell: str) -> str:
        return self.labels.get(cell, cell)

    def of(self, model: str, cell: str, tasks: set[str]) -> dict[Document, Sample]:
        return {key: item for key, item in self.by_cell.get((model, cell), {}).items() if key[0] in tasks}


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
    shared = {(sample["model"], sample["task"], sample["document"]) for sample in run.samples}
    shared &= {(sample["model"], sample["task"], sample["document"]) for sample in baseline.samples}
    _refuse_others(run, baseline, shared)
    mine, other = _Side(run), _Side(baseline)
    same = _same_cells(mine, other)
    findings: list[Finding] = []
    for row in headline(baseline.rows):
        findings += _of_row(row, baseline.rows, mine, other, same, tolerances)
    notes = [f"{side.name} has not ended" for side in (run, baseline) if not (side.record or {}).get("finished")]
    notes += _other_terms(run, baseline)
    if tolerances.judge_speed:
        tolerance = tolerances.speed
        if tolerance is None:
            here, there = ((side.record or {}).get("hardware") for side in (run, baseline))
            tolerance = SAME_MACHINE if here == there else OTHER_MACHINE
        for model, cell in other.by_cell:
            if cell != FULL and cell in same and (model, same[cell]) in mine.by_cell:
                findings.append(_speed(model, cell, same[cell], mine, other, tolerance))
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
    for failure in (run.record or {}).get("failures", []):
        where = ", ".join(failure[name] for name in ("task", "cell", "document") if name in failure)
        notes.append(f"failed in the run: {where}: {failure['error']}")
    return Report(findings=findings, notes=notes)


def _refuse_others(run: Run, baseline: Run, shared: set[tuple[str, str, str]]) -> None:
    """Raises :class:`UserError` (exit code 2) where the two have answered other questions."""

    def kept(side: Run) -> Run:
        samples = [item for item in side.samples if (item["model"], item["task"], item["document"]) in shared]
        return Run(name=side.name, rows=side.rows, record=side.record, samples=samples)

    pairs = sorted({(model, task) for model, task, _ in shared})
    if not pairs:
        asked = [
            "; ".join(sorted({f"{item['task']} on {item['model']}" for item in side.samples}))
            for side in (run, baseline)
        ]
        what = f"{asked[0]}, and {asked[1]}" if asked[0] != asked[1] else f"other documents of {asked[0]}"
        raise UserError(f"{run.name} and {baseline.name} have nothing in common: {what}", exit_code=2)
    first, second = kept(run), kept(baseline)
    for model, task in pairs:
        if reason := difference(first, second, model, task):
            raise UserError(
                f"{run.name} and {baseline.name} must not be compared on {task}, {model}: {reason}", exit_code=2
            )


def _other_terms(run: Run, baseline: Run) -> list[str]:
    """Versions, precision and machine, where they differ."""
    here, there = run.record or {}, baseline.record or {}
    terms: list[tuple[str, Any, Any]] = []
    for group in ("packages", "hardware"):
        new, old = here.get(group, {}), there.get(group, {})
        terms += [(name, old.get(name), new.get(name)) for name in sorted({*new, *old})]
    for model, new in here.get("models", {}).items():
        old = there.get("models", {}).get(model, {})
        terms += [(f"{name} of {model}", old.get(name), new.get(name)) for name in ("dtype", "device")]
    return [f"{name}: {old} in the baseline, now {new}" for name, old, new in terms if old != new]


def _members(task: str, rows: Iterable[Row]) -> set[str]:
    """The task, or all that were asked for through the group of that name."""
    parts = {row["task"] for row in rows if row["part_of"] == task and row["task"] != task}
    return {task}.union(*(_members(part, rows) for part in parts))


def _of_row(
    row: Row, rows: Sequence[Row], mine: _Side, other: _Side, same: Mapping[str, str], tolerances: Tolerances
) -> list[Finding]:
    """What a row of the baseline's ``results.csv`` is compared with; bytes stand with a task's first metric."""
    model, task, metric, cell = (row[name] for name in ("model", "task", "metric", "cell"))
    tasks = _members(task, rows)
    named: dict[str, Any] = {"model": model, "cell": other.label(cell)}
    what = f"{task} {metric}"
    before = other.of(model, cell, tasks)
    now = mine.of(model, same[cell], tasks) if cell in same else {}
    documents = [document for document in before if document in now]
    first = next(item["metric"] for item in rows if (item["model"], item["task"], item["cell"]) == (model, task, cell))
    findings = []
    if metric == first and (not documents or len(documents) < len(before)):
        note = f"{len(documents)} of {len(before)} documents measured"
        findings.append(Finding(outcome=MISSING, what=task, **named, note=note))
    if not documents:
        return findings
    share = tolerances.score if row["higher_is_better"] else tolerances.divergence
    scores = [(now[item]["scores"].get(metric), before[item]["scores"].get(metric)) for item in documents]
    values = [(new, old) for new, old in scores if new is not None and old is not None]
    if len(values) < len(scores):
        # No mean over documents, such as a corpus' perplexity: one number against another.
        found = mine.rows.get((model, task, metric, same[cell]))
        if found is None or found["n"] != row["n"]:
            findings.append(Finding(outcome=MISSING, what=what, **named, note="not over all documents"))
            values = []
        else:
            values = [(found["score"], row["score"])]
    if values:
        level = fmean(old for _, old in values)
        tolerance = max(share * abs(level), LEAST_TOLERANCE)
        findings.append(_score(what, named, values, tolerance, higher_is_better=bool(row["higher_is_better"])))
    documents = [item for item in documents if before[item]["kv_bytes"] and now[item]["full_kv_bytes"]]
    if metric == first and documents:
        findings.append(_bytes(f"{task} KV bytes", named, now, before, documents, tolerances.kv_bytes))
    return findings


def _change_text(change: float, interval: Interval | None, tolerance: float, text: Callable[[float], str]) -> str:
    ends = "" if interval is None else f" [{text(interval.low)}, {text(interval.high)}]"
    return f"{text(change)}{ends}, tolerance {text(tolerance).lstrip('+')}"


def _score(
    what: str,
    named: Mapping[str, Any],
    values: Sequence[tuple[float, float]],
    tolerance: float,
    *,
    higher_is_better: bool,
) -> Finding:
    run, baseline = [new for new, _ in values], [old for _, old in values]
    outcome, change, interval = judge(run, baseline, tolerance, higher_is_better=higher_is_better)
    return Finding(
        outcome=outcome,
        what=what,
        **named,
        baseline=score_text(fmean(baseline)),
        run=score_text(fmean(run)),
        change=_change_text(change, interval, tolerance, lambda value: score_text(value, sign="+")),
        note="" if interval is not None else f"n={len(values)}: no interval",
    )


def _bytes(
    what: str,
    named: Mapping[str, Any],
    now: Mapping[Document, Sample],
    before: Mapping[Document, Sample],
    documents: Sequence[Document],
    tolerance: float,
) -> Finding:
    """The rise of the bytes, or that of their share of a full cache, whichever is smaller.

    An answer of another length changes one of the two: the bytes of a cache that grows, the share of one that does not.
    """
    old = [float(before[document]["kv_bytes"]) for document in documents]
    new = []
    for document in documents:
        full = before[document]["full_kv_bytes"] / now[document]["full_kv_bytes"]
        new.append(now[document]["kv_bytes"] * min(1.0, full))
    level = fmean(old)
    outcome, change, interval = judge(new, old, tolerance * level, higher_is_better=False)
    return Finding(
        outcome=outcome,
        what=what,
        **named,
        baseline=bytes_text(level),
        run=bytes_text(fmean(now[document]["kv_bytes"] for document in documents)),
        change=_change_text(change, interval, tolerance * level, lambda value: percent_text(value / level, sign="+")),
        note="" if interval is not None else f"n={len(documents)}: no interval",
    )


def _speed(model: str, cell: str, twin: str, mine: _Side, other: _Side, tolerance: float) -> Finding:
    """Tokens/s over those of ``full`` on the same document, over all tasks."""
    named: dict[str, Any] = {"model": model, "cell": other.label(cell), "what": "tokens/s over full's"}

    def ratios(side: _Side, key: str) -> dict[Document, float]:
        full = side.by_cell.get((model, FULL), {})
        steps = {
            document: (_step_ms(full[document]), _step_ms(sample))
            for document, sample in side.by_cell[model, key].items()
            if document in full
        }
        return {document: math.log(a / b) for document, (a, b) in steps.items() if a and b}

    now, before = ratios(mine, twin), ratios(other, cell)
    documents = [document for document in before if document in now]
    changes = [now[document] - before[document] for document in documents]
    change, interval = pseudomedian(changes) if changes else (0.0, None)
    if interval is None:
        note = f"{len(documents)} documents with times of it and of full: too few to judge speed"
        return Finding(outcome=OPEN, **named, note=note)
    limit = -math.log1p(-tolerance)
    # The change at which the interval, as wide as it is, would lie beyond the tolerance.
    failing = -math.expm1(-limit - (interval.high - change))
    return Finding(
        outcome=_outcome(interval, limit, higher_is_better=True),
        **named,
        baseline=f"{math.exp(median(before[document] for document in documents)):.2f}",
        run=f"{math.exp(median(now[document] for document in documents)):.2f}",
        change=_change_text(
            math.expm1(change),
            Interval(math.expm1(interval.low), math.expm1(interval.high)),
            tolerance,
            lambda value: percent_text(value, sign="+"),
        ),
        note=f"a drop of {percent_text(failing)} would fail",
    )


# --- Writing ---


def summary(report: Report) -> str:
    """The verdict in one line."""
    counts = Counter(finding.outcome for finding in report.findings)
    said = ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in (WORSE, MISSING, OK, BETTER, OPEN, NEW) if counts[outcome]
    )
    return f"{'FAILED' if report.failed else 'passed'}: {said}"


def lines(report: Report) -> list[str]:
    """One line per finding, columns below each other, then the notes."""
    several = len({finding.model for finding in report.findings}) > 1
    cells = [
        [
            finding.outcome.upper() if finding.outcome in FAILING else finding.outcome,
            *([finding.model] if several else []),
            finding.cell,
            finding.what,
            f"{finding.baseline} -> {finding.run}" if finding.run else "",
            "; ".join(filter(None, (finding.change, finding.note))),
        ]
        for finding in report.findings
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [*table, *[f"note: {note}" for note in report.notes]]


def to_markdown(report: Report) -> str:
    """The summary of a CI job: what failed first, all else folded away."""
    header = ["", "method", "what", "baseline", "run", "change [95 %]", ""]

    def table(findings: Sequence[Finding]) -> list[str]:
        rows = [
            [item.outcome, item.cell, item.what, item.baseline, item.run, item.change, item.note] for item in findings
        ]
        body = ["| " + " | ".join(map(in_markdown, row)) + " |" for row in rows]
        return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *body, ""]

    failing = [finding for finding in report.findings if finding.outcome in FAILING]
    others = [finding for finding in report.findings if finding.outcome not in FAILING]
    text = [f"### arkv-bench check {in_markdown(summary(report))}", ""]
    if failing:
        text += table(failing)
    if others:
        text += [f"<details><summary>{len(others)} more</summary>", "", *table(others), "</details>", ""]
    return "\n".join([*text, *[f"- {in_markdown(note)}" for note in report.notes], ""])
