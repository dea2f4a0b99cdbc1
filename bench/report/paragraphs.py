"""A run in words: who is best at each budget and how sure that is, and what is missing, failed or was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bench.judge.budgets import by_budget
from bench.names import FULL, RECORD, RESULTS, SAMPLES, budget_text
from bench.records.finished import Run
from bench.records.record import Record
from bench.records.row import Row
from bench.records.shown import headline
from bench.report.columns import AGAINST_FULL, DIFFERENCE, SCORE
from bench.report.comparison import detectable

LISTED = 50
"""Cut documents that are named one by one."""


def named(row: Row) -> str:
    """A method with its format."""
    return " ".join(filter(None, (row.method, row.quant_format)))


def _scored(row: Row) -> str:
    return SCORE.cell(row).replace("\n", " ")


def in_words(names: Sequence[str]) -> str:
    """Each name once: "a, b and c"."""
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"


def _against(row: Row) -> str:
    said = AGAINST_FULL.cell(row)
    if not said:
        return "not compared with full"
    shown = DIFFERENCE.cell(row).replace("\n", " ")
    if said.startswith("cannot tell"):
        return f"{said} ({shown})"
    return f"{said} from full ({shown})" if said.startswith("not ") else f"{said.replace(',', ' than full,')} ({shown})"


def budget_sentences(rows: Sequence[Row]) -> list[str]:
    """A sentence per budget: who is best, with the interval, and who cannot be told from it.

    Args:
        rows: of one run, model, task and metric.
    """
    sentences = []
    for group in by_budget(rows):
        if group[0].method == FULL:
            continue
        budget = budget_text(group[0].budget_unit, group[0].cache_size, group[0].cache_ratio)
        where = f"At {budget}" if budget else "Of one size whatever the budget"
        playing = [row for row in group if not row.not_exercised]
        if not playing:
            sentences.append(f"{where}, every prompt fits: nothing was compressed, so no method was put to the test.")
            continue
        sign = 1 if playing[0].higher_is_better else -1
        best = max(playing, key=lambda row: sign * row.score)
        tops = [row for row in playing if row.score == best.score]
        if len(playing) == 1:
            sentences.append(f"{where}, {named(best)} scores {_scored(best)}: {_against(best)}.")
        elif any(row.leading for row in playing):
            equal = [named(row) for row in playing if row.leading and row is not best]
            behind = [named(row) for row in playing if not row.leading]
            also = f"not distinguishable from it: {in_words(equal)}; " if equal else ""
            sentences.append(
                f"{where}, {named(best)} is best with {_scored(best)}, {_against(best)}; "
                f"{also}behind: {in_words(behind)}."
            )
        else:
            verb = "scores highest" if sign > 0 else "scores lowest (best)"
            names = in_words([named(row) for row in tops])
            if len(tops) > 1:
                verb = verb.replace("scores", "score")
            sentences.append(
                f"{where}, no method can be told from the best: {names} {verb} with {_scored(best)}, {_against(best)}."
            )
    return sentences


def answer(run: Run) -> str:
    """The paragraph on top: each task's first metric, budget by budget; a count of leaders where there are many."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in headline(run.rows):
        mine = groups.setdefault((row.model, row.task), [])
        if not mine or row.metric == mine[0].metric:
            mine.append(row)
    if not groups:
        return "No task has ended yet: there is nothing to compare."
    if len(groups) > 2:
        return " ".join(_counts(groups))
    sentences = []
    for (model, task), rows in groups.items():
        full = next((row for row in rows if row.method == FULL), None)
        what = f"{task} ({rows[0].metric}, {model}, n={max(row.n for row in rows)})"
        said = f"the full cache scores {_scored(full)}" if full else "the full cache was not measured"
        sentences += [f"On {what}, {said}.", *budget_sentences(rows)]
        sentences += [f"{text[0].upper()}{text[1:]}." for text in detectable(rows)]
    return " ".join(sentences)


def _counts(groups: Mapping[tuple[str, str], Sequence[Row]]) -> list[str]:
    """Over many tasks: how often each method leads a budget, and how often it is distinguishable from full."""
    budgets: dict[str, list[list[Row]]] = {}
    for rows in groups.values():
        for group in by_budget(rows):
            if group[0].method != FULL:
                first = group[0]
                text = budget_text(first.budget_unit, first.cache_size, first.cache_ratio)
                budgets.setdefault(text, []).append([row for row in group if not row.not_exercised])
    sentences = [f"{len(groups)} comparisons of a model on a task, each by its first metric."]
    for budget, found in budgets.items():
        where = f"At {budget}" if budget else "Of one size whatever the budget"
        told = [group for group in found if any(row.leading for row in group)]
        leads = tally([named(row) for group in told for row in group if row.leading])
        worse = tally([named(row) for group in found for row in group if AGAINST_FULL.cell(row).startswith("worse")])
        empty = sum(not group for group in found)
        said = f"best, or not distinguishable from the best, {leads}; " if told else ""
        undecided = len(found) - len(told) - empty
        sentences.append(
            f"{where}: {said}no method can be told from the best in {undecided} of {len(found)}"
            + (f", nothing was compressed in {empty}" if empty else "")
            + f"; worse than full beyond doubt: {worse or 'none'}."
        )
    return sentences


def tally(names: Sequence[str]) -> str:
    return ", ".join(f"{name} in {count}" for name, count in Counter(names).items())


def problems_of(run: Run) -> list[str]:
    """What is missing, failed or was cut in a run."""
    said: list[str] = []
    record = run.record
    if not run.is_run:
        return said if record is not None or not run.timings else [f"no {RECORD}: what was timed is unknown"]
    if not run.rows:
        counts = tally([f"{sample.task}, {sample.cell}," for sample in run.samples.values()])
        said.append(f"no {RESULTS}: no task has ended; {SAMPLES} holds {len(run.samples)} answers: {counts}")
    if record is None:
        said.append(f"no {RECORD}: what made these results is unknown, and so is whether they may be compared")
    elif not record.finished:
        said.append("the run has not ended: these are the results so far")
    if not run.samples:
        said.append(f"no {SAMPLES}: no ratios by layer, and prompts cannot be compared with those of other runs")
    for failure in record.failures if isinstance(record, Record) else []:
        what = ", ".join(filter(None, (failure.task, failure.model))) or f"plugin {failure.plugin}"
        said.append(f"failed: {what}: {failure.error}")
    cut: dict[tuple[str, str], dict[str, None]] = {}
    for sample in run.samples.values():
        if sample.truncated:
            cut.setdefault((sample.task, sample.model), {})[sample.document] = None
    for (task, model), documents in cut.items():
        more = "" if len(documents) <= LISTED else f" and {len(documents) - LISTED} more"
        named = ", ".join(list(documents)[:LISTED])
        said.append(
            f"{task}, {model}: {len(documents)} prompts were longer than the context or --max-length and were cut: "
            f"{named}{more}"
        )
    return said
