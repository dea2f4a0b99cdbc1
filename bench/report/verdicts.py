"""The answer of a run in a few lines: at each budget the best method, what is tied with it, its costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.judge.budgets import by_budget
from bench.names import FULL, budget_text
from bench.records.files.numbers import percent_text
from bench.records.files.text import printable
from bench.records.finished import Run
from bench.records.record import Record
from bench.records.row import Row
from bench.records.shown import headline
from bench.report.columns import AGAINST_FULL, DIFFERENCE, SCORE
from bench.report.comparison import detectable
from bench.report.paragraphs import in_words, named, tally

LINES = 5
"""Of the table: more is for the tables below it."""
HEADERS = ("budget", "best method", "tied with it", "what it costs")
FIXED = "fixed size"
TIME = "x its time"
"""As a cost in time is said."""
TIMES = "beside whatever else the machine did: arkv-bench speed measures them by themselves"
TOGETHER = 2
"""Tasks of a model whose budgets stand one by one; of more, each budget is counted over all of them."""


@dataclass(frozen=True)
class Verdict:
    """A line of the table."""

    budget: str
    best: str
    equal: str
    cost: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As :data:`HEADERS` has them."""
        return self.budget, self.best, self.equal, self.cost


@dataclass(frozen=True)
class Answer:
    """What stands on top of a page about a run."""

    lines: list[Verdict]
    notes: list[str]
    """What the full cache scores, how small a difference could be shown, and what is not in the table."""


def answer(run: Run) -> Answer:
    """By each task's first metric; of many tasks, counts over all of them."""
    groups = by_task(headline(run.rows))
    if not groups:
        return Answer([], ["No task has ended yet: there is nothing to compare."])
    notes: list[str] = []
    if len(groups) > TOGETHER:
        lines = _counted(groups)
        notes.append(f"{len(groups)} comparisons of a model on a task, each by its first metric.")
    else:
        lines = []
        for rows in groups:
            model, task = rows[0].model, rows[0].task
            lines += verdicts(rows, task if len(groups) > 1 else "")
            full = next((row for row in rows if row.method == FULL), None)
            what = f"{task} ({rows[0].metric}, {model}, n={max(row.n for row in rows)})"
            said = f"the full cache scores {_scored(full)}" if full else "the full cache was not measured"
            notes.append(" ".join([f"On {what}, {said}.", *(f"{_capital(text)}." for text in detectable(rows))]))
    if any(TIME in line.cost for line in lines):
        timed = timed_with(run.of_run)
        notes.append(f"Times are of this run{f' ({timed})' if timed else ''}, {TIMES}.")
    if len(lines) > LINES:
        notes.append(f"{len(lines) - LINES} more budgets stand in the tables below.")
    return Answer(lines[:LINES], notes)


def by_task(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of each model and task, of its first metric only."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        mine = groups.setdefault((row.model, row.task), [])
        if not mine or row.metric == mine[0].metric:
            mine.append(row)
    return list(groups.values())


def timed_with(record: Record) -> str:
    """What a run's times are of, in a few words; empty where its record does not say."""
    last = [(start.hardware or {}, (start.model_extra or {}).get("batch_size")) for start in record.starts]
    found = last or [(record.hardware, record.settings.get("batch_size"))]
    threads = {hardware.get("torch_threads") for hardware, _ in found} - {None}
    batches = {str(batch) for _, batch in found if batch is not None}
    machines = {name for hardware, _ in found for name in hardware.get("gpus") or [hardware.get("cpu")] if name}
    said = [printable(_either(machines))] if machines else []
    said += [f"{_either(threads)} {'thread' if threads == {1} else 'threads'}"] if threads else []
    return ", ".join([*said, f"batch size {_either(batches)}"] if batches else said)


def times_of(runs: Sequence[Run]) -> str:
    """What the times of one or more runs are of, as a sentence; empty where no record says."""
    said = {run.name: timed for run in runs if run.is_run and (timed := timed_with(run.of_run))}
    if len(set(said.values())) == 1 and len(said) == len(runs):
        return f"Times: {next(iter(said.values()))}."
    return f"Times: {'; '.join(f'{name}: {timed}' for name, timed in said.items())}." if said else ""


def _either(values: Iterable[object]) -> str:
    """All of them where starts differ."""
    return " or ".join(sorted(map(str, values)))


def verdicts(rows: Sequence[Row], task: str = "") -> list[Verdict]:
    """A line per budget, those that methods were asked for first.

    Args:
        rows: of one run, model, task and metric.
        task: where lines of several stand together.
    """
    full = next((row for row in rows if row.method == FULL), None)
    return [_verdict(group, full, ", ".join(filter(None, (task, budget)))) for budget, group in _budgets(rows).items()]


def _budgets(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by budget, largest first; of no budget last, all of them together."""
    found: dict[str, list[Row]] = {}
    for group in by_budget([row for row in rows if row.method != FULL]):
        first = group[0]
        text = budget_text(first.budget_unit, first.cache_size, first.cache_ratio) or FIXED
        found.setdefault(text, []).extend(group)
    return dict(sorted(found.items(), key=lambda item: -(item[1][0].cache_ratio or item[1][0].cache_size or 0)))


def _verdict(group: Sequence[Row], full: Row | None, budget: str) -> Verdict:
    playing = [row for row in group if not row.not_exercised]
    if not playing:
        return Verdict(budget, "", "", "every prompt fits: nothing was compressed")
    sign = 1 if playing[0].higher_is_better else -1
    best = max(playing, key=lambda row: sign * row.score)
    tops = [row for row in playing if row.score == best.score]
    others = [row for row in playing if row is not best]
    if not others:
        equal = "nothing else was measured"
    elif any(row.leading for row in playing):
        tops = [best]
        equal = ", ".join(named(row) for row in others if row.leading) or "none: all others are behind"
    else:
        rest = [row for row in playing if row not in tops]
        equal = ", ".join(map(named, rest)) or "they score the same"
    return Verdict(budget, f"{in_words([named(row) for row in tops])}: {_scored(best)}", equal, _cost(best, full))


def _cost(row: Row, full: Row | None) -> str:
    """In bytes, time and score, beside the full cache."""
    said = [f"{percent_text(row.kv_share)} of full's bytes" if row.kv_share is not None else ""]
    times = []
    # A method that reads the prompt again is paid for before the first token.
    if full is not None and full.ttft_ms and row.ttft_ms:
        times.append(f"{row.ttft_ms / full.ttft_ms:.2f} {TIME} to the first token")
    if full is not None and full.tpot_ms and row.tpot_ms:
        times.append(f"{row.tpot_ms / full.tpot_ms:.2f} {TIME} per token")
    said += times
    against = AGAINST_FULL.cell(row)
    difference = DIFFERENCE.cell(row).replace("\n", " ")
    said.append(": ".join(filter(None, (against and f"score {against}", difference))) or "not compared with full")
    return "; ".join(filter(None, said))


def _scored(row: Row) -> str:
    return SCORE.cell(row).replace("\n", " ")


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _counted(tasks: Sequence[Sequence[Row]]) -> list[Verdict]:
    """Over many tasks: how often each method leads a budget, and how often it is worse than full beyond doubt."""
    budgets: dict[str, list[list[Row]]] = {}
    for rows in tasks:
        for budget, group in _budgets(rows).items():
            budgets.setdefault(budget, []).append([row for row in group if not row.not_exercised])
    lines = []
    for budget, found in budgets.items():
        playing = [group for group in found if group]
        told = [group for group in playing if any(row.leading for row in group)]
        leads = tally([named(row) for group in told for row in group if row.leading])
        worse = tally([named(row) for group in found for row in group if AGAINST_FULL.cell(row).startswith("worse")])
        shares = [row.kv_share for group in playing for row in group if row.kv_share is not None]
        undecided = f"all methods in {len(playing) - len(told)} of {len(found)}"
        idle = f"; nothing was compressed in {len(found) - len(playing)}" if len(playing) < len(found) else ""
        cost = f"{percent_text(fmean(shares))} of full's bytes; " if shares else ""
        best = f"best, or tied with the best: {leads}" if leads else ""
        lines.append(Verdict(budget, best, undecided + idle, f"{cost}worse than full beyond doubt: {worse or 'none'}"))
    return lines
