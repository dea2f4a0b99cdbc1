"""The comparison of a task: ``full`` on top, budgets grouped by true bytes, methods in one order, with notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.judge.budgets import by_budget
from bench.judge.verdict import ALPHA
from bench.methods.names import limits_of
from bench.names import BUDGET_UNITS, FULL, LEAST_DOCUMENTS, RECORD, RESULTS, TRISTATE, with_format
from bench.records.files.numbers import percent_text, score_text
from bench.records.finished import Run, comparable
from bench.records.row import Row
from bench.records.shown import headline
from bench.report.columns import TOLERANCE, adjusted, budget_cell, is_older, no_retention, off_budget, untold
from bench.report.looks import place_of

WITHIN = "differences, p-values and bold are within each run; what changed from run to run stands in a table of its own"

_QUESTIONS = {
    "after": "question after: the context was compressed without it, and it was read through what was left",
    "before": "question before: it was a part of the prompt that was compressed",
    "inside": "question inside: the task tells none from its context, all of the prompt was compressed",
    "mixed": "question after its context where the task tells the two apart, else inside the compressed prompt",
}
"""What the rows' ``question`` means."""
BOLD = "bold: the best of a budget, and what is tied with it"
NOT_EXERCISED = "not exercised: every prompt and answer fits the budget, so that nothing was compressed"


@dataclass(frozen=True)
class Comparison:
    """One table: rows in groups, one group per budget, by falling bytes; within a group in the order of the methods."""

    title: str
    groups: list[list[Row]]
    notes: list[str] = field(default_factory=list)
    brief: list[str] = field(default_factory=list)
    """What a short table cannot be read without."""


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per model, task and metric, in the order of the rows."""
    keys = dict.fromkeys((row.model, row.task, row.metric) for row in rows)
    comparisons = []
    for model, task, metric in keys:
        mine = [row for row in rows if (row.model, row.task, row.metric) == (model, task, metric)]
        groups = [sorted(group, key=_in_order) for group in by_budget(mine)]
        groups.sort(key=_by_budget)
        counts = sorted({row.n for row in mine})
        direction = "higher" if mine[0].higher_is_better else "lower"
        title = f"{task}, {metric} ({direction} is better), {model}, n={'-'.join(map(str, counts))}{_of_sources(mine)}"
        notes = _notes(mine)
        if len({row.run for row in mine}) > 1:
            notes.append(WITHIN)
        comparisons.append(Comparison(title, groups, notes, _brief(mine)))
    return comparisons


def _of_sources(rows: Sequence[Row]) -> str:
    """How many sources the documents are of; empty where each is one of its own."""
    counts = sorted({row.sources for row in rows if row.sources is not None})
    if all(row.sources in (None, row.n) for row in rows):
        return ""
    return f" documents of {'-'.join(map(str, counts))} sources"


def tables_of(runs: Sequence[Run]) -> tuple[list[list[Row]], list[str]]:
    """The rows to show of several runs, each with its run: those of a task in one table where they may be compared; and
    why some may not."""
    tables: list[list[Row]] = []
    reasons: list[str] = []
    for model, task in dict.fromkeys((row.model, row.task) for run in runs for row in headline(run.rows)):
        sets, why = comparable(runs, model, task)
        reasons += why
        for together in sets:
            mine = [(run.name, row) for run in together for row in run.rows if (row.model, row.task) == (model, task)]
            tables.append([row.model_copy(update={"run": name}) for name, row in mine])
    return tables, reasons


def _in_order(row: Row) -> tuple[Any, ...]:
    """The methods of a budget in the order that they have everywhere, whatever they score or take."""
    return (*place_of(row.method), row.quant_format or "", row.window_size or 0, row.run or "", row.cell)


def _by_budget(group: Sequence[Row]) -> tuple[Any, ...]:
    """``full`` first, then most bytes first; of budgets whose bytes are next to equal, the smaller window."""
    # A method that only masks tokens holds as much at every budget.
    least = min(row.kv_bytes_mean or 0.0 for row in group)
    return group[0].method != FULL, -float(f"{least:.2g}"), group[0].window_size or 0


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    units = {row.budget_unit for row in rows if row.budget_unit is not None}
    windows = sorted({row.window_size for row in rows if row.window_size is not None})
    newest = " or ".join(map(str, windows))
    window = f"; the newest {newest} tokens stay at model precision, as each method has it" if windows else ""
    if units:
        notes.append("budget: " + "; ".join(BUDGET_UNITS[unit] for unit in sorted(units)) + window)
    notes += [said for place, said in _QUESTIONS.items() if any(row.question == place for row in rows)]
    if repeats := sorted({row.repeats for row in rows if row.repeats is not None}):
        times = "-".join(map(str, repeats))
        notes.append(f"answers are sampled, {times} of each document: scores are avg@{times}, intervals over documents")
    if any(row.leading for row in rows):
        notes.append(BOLD)
    notes += filter(None, [_tied_and_behind(rows)])
    notes += dict.fromkeys(filter(None, map(untold, rows)))
    notes += filter(None, [no_retention(rows)])
    notes += detectable(rows)
    if any(row.p_to_best is not None and row.difference is None for row in rows):
        distance = any(row.of_full is not None or row.method == FULL for row in rows)
        why = "a distance from full is not compared with full" if distance else "full was not measured"
        how = ", by the ratio of the two where it cannot be negative" if distance else ""
        notes.append(
            f"{why}: each row is compared with the best at the same budget, paired{how}; like the best: tied with it"
        )
    if any(map(is_older, rows)):
        notes.append(
            f"{RESULTS} is of an older suite: p by Holm, and differences without intervals, since those of each row "
            "alone say something else; the run's own command writes the file anew"
        )
    if any(row.not_exercised for row in rows):
        notes.append(NOT_EXERCISED)
    off = [row for row in rows if off_budget(row)]
    if off:
        notes.append(
            f"* not within {100 * TOLERANCE:.0f} % of the bytes asked for, as shares of the prompt's bytes (KV of full "
            f"is a share of what full holds in the end): {_taken(off)}"
        )
        notes += dict.fromkeys(filter(None, map(_why_off, off)))
    for row in rows:
        if row.method != FULL and row.cache_size is None and row.cache_ratio is None:
            shares = ((row.kv_share_of_prompt, "the prompt's bytes"), (row.kv_share, "what full holds in the end"))
            stands = ", ".join(f"{percent_text(share)} of {whole}" for share, whole in shares if share is not None)
            notes.append(f"{row.method} is of a fixed size: {stands}")
    notes += _of_documents(rows)
    if several := [name for name, count in Counter(map(_name, rows)).items() if count > 1]:
        notes.append(f"rows of one name are of other settings, see cell in {RESULTS}: {', '.join(several)}")
    timed = sorted({row.timed_documents for row in rows if row.timed_documents is not None})
    if any(row.timed_documents is not None and row.timed_documents < row.n for row in rows):
        of = "-".join(map(str, sorted({row.n for row in rows})))
        notes.append(
            f"times are over {' to '.join(map(str, dict.fromkeys((timed[0], timed[-1]))))} of {of} documents: those "
            f"measured on the same hardware, threads and batch size, see starts in {RECORD}"
        )
    return notes


def _of_documents(rows: Sequence[Row]) -> list[str]:
    """What is to be known of the documents that the rows are over."""
    notes = []
    truncated = max((row.truncated_documents or 0) for row in rows)
    if truncated:
        notes.append(f"{truncated:.0f} prompts were longer than the context or --max-length and were cut")
    full = any(row.method == FULL for row in rows)
    if len({row.n for row in rows}) > 1:
        notes.append(
            "the rows are over different numbers of documents: the run is not complete, or asked some of its methods "
            "other ones; compare scores of the same n, a difference to full is over the row's own documents"
        )
    elif full and any(row.score_full is None for row in rows):
        notes.append("not compared with full: rows over documents that full has not answered")
    return notes


def _brief(rows: Sequence[Row]) -> list[str]:
    """Of the notes those that change how a row is read, in fewer words."""
    notes = [said for place, said in _QUESTIONS.items() if any(row.question == place for row in rows)]
    if any(row.leading for row in rows):
        notes.append(BOLD)
    if any(row.not_exercised for row in rows):
        notes.append(NOT_EXERCISED)
    if off := dict.fromkeys(row.method for row in rows if off_budget(row)):
        notes.append(f"* not the bytes asked for: {', '.join(off)}")
    if any(row.ragged_share is not None for row in rows):
        notes.append("in brackets: what a method that only masks tokens of single heads would hold without them")
    return notes + _of_documents(rows)


def _name(row: Row) -> str:
    """What tells a row from the others of its table."""
    window = "" if row.window_size is None else f"W={row.window_size}"
    return " ".join(filter(None, (row.run, with_format(row.method, row.quant_format), budget_cell(row), window)))


def _taken(rows: Sequence[Row]) -> str:
    """What rows hold of the prompt's bytes beside what they were asked for, method by method."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(f"{percent_text(row.kv_share_of_prompt)} for {budget_cell(row)}")
    return "; ".join(f"{method} {', '.join(said)}" for method, said in found.items())


def _tied_and_behind(rows: Sequence[Row]) -> str:
    """Why a row can be tied with ``full`` and behind the best of its budget; empty where none is both."""
    both = [
        f"{' '.join(filter(None, (row.run, with_format(row.method, row.quant_format))))} at {budget_cell(row)}"
        for row in rows
        if row.difference is not None
        and not untold(row)
        and (adjusted(row) or 0.0) >= ALPHA
        and row.p_to_best is not None
        and row.p_to_best < ALPHA
    ]
    if not both:
        return ""
    return (
        f"tied with full and still behind the best of the budget: {', '.join(both)}; a tie means that so many "
        "documents do not show a difference to full, not that there is none, and to the best they do show one"
    )


def _why_off(row: Row) -> str:
    """Why a method does not stand at the bytes asked for; empty where nothing here knows."""
    if limits := limits_of(row.method):
        return f"{row.method}: {limits}"
    if row.method not in TRISTATE:
        return ""
    if (row.kv_share_of_prompt or 0.0) > (row.cache_ratio or 0.0):
        return f"{row.method}: the window and the sinks of prompts so short take more"
    return f"{row.method}: what is left is less than a token, or than a whole group of quantized ones, in every layer"


def detectable(rows: Sequence[Row]) -> list[str]:
    """What differences to ``full`` so many documents could have shown."""
    compared = [row for row in rows if row.difference is not None and not row.not_exercised and row.cannot_tell is None]
    known = sorted({score_text(row.detectable_difference, 2) for row in compared} - {""}, key=float)
    if known:
        span = " to ".join(dict.fromkeys((known[0], known[-1])))
        return [f"smallest difference to full that so many documents show with 80 % power: {span}"]
    return [f"so few documents cannot show a difference to full{_enough(compared)}"] if compared else []


def _enough(rows: Sequence[Row]) -> str:
    """How many documents there are, and how many could show one: as far as that is known before they are scored."""
    # It needs SciPy, and most tables have documents enough.
    from bench.judge.power import documents_needed

    n = min(row.n if row.sources is None else row.sources for row in rows)
    needed = documents_needed(len(rows)) if all(row.binary for row in rows) else LEAST_DOCUMENTS
    if needed is None or n >= needed:
        return f" (n = {n})"
    shown = "could, where half of the answers is lost" if all(row.binary for row in rows) else "give intervals"
    options = "--samples, or --limit for given documents"
    return f" (n = {n}); {needed} {shown}: {options}"
