"""The exam: what each method keeps with the question behind the compressed context."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from bench.names import FULL, own_name
from bench.records.files.markdown import markdown_table
from bench.records.files.numbers import seconds_text
from bench.records.row import Row
from bench.records.timing import read_timings
from scripts.figures_in_docs.common import (
    RESULTS,
    aligned,
    check_said,
    known,
    least_budget,
    length_asked,
    model_of,
    paragraph,
    percent,
    rows_at,
    rows_of,
    rows_within,
    since_changed,
    threads_of,
    with_interval,
)

EXAM = "exam/qwen2.5-coder-0.5b-1024"
TIMES = "speed/exam"
"""Where the methods of the exam were timed: beside other work, as the exam was run, times say nothing."""
ASKED = {"ruler:niah_multikey_2": "one of many keyed numbers", "ruler:vt": "variables of one value"}
"""The tasks of the exam in a few words."""
QUANTIZED_PRESS = "kvpress:kvzip+quanto-int4"
SHORT = {"ruler:niah_multikey_2": "keyed numbers", "ruler:vt": "variables"}
"""In the head of a column."""


def exam_figure() -> str:
    """The figure on top: the exam's score against true bytes."""
    rows = drawn()
    task, n, ratio = rows[0].task, rows[0].n, least_budget(rows)
    found = sorted(rows_within(rows, ratio), key=lambda row: -row.score)
    said = ", ".join(f"{row.method} {row.score:.0f}" for row in found)
    alt = f"Score of {ASKED[own_name(task)]} against true KV bytes; in {100 * ratio:g} % of the bytes: {said}"
    caption = paragraph(
        f"""*{ASKED[own_name(task)].capitalize()} in a text of up to {length_asked(EXAM):,} tokens, asked for after
        compression: RULER's `{own_name(task).partition(":")[2]}`, {n} documents, {model_of(EXAM)}, with 95 % intervals;
        `results/{EXAM}` has the record.*"""
    )
    return f"![{alt}](results/{EXAM}/score.png)\n\n{caption}"


def drawn() -> list[Row]:
    """What the figure on top shows: the first task of the exam."""
    rows = [row for row in rows_of(EXAM, "string_match") if row.part_of]
    return [row for row in rows if row.task == rows[0].task]


def exam() -> str:
    """What each method keeps of the exam, with the question behind the compressed context: a narrow table."""
    found = _Exam()
    shares = " / ".join(f"{100 * ratio:g}" for ratio in found.ratios)
    lines = []
    for method in found.methods:
        # The full cache has no budget: one score is at all of them.
        ratios = [None] if method == FULL else found.ratios
        scores = [" / ".join(_whole(found.row(method, task, ratio)) for ratio in ratios) for task in found.tasks]
        lines.append([method, *scores, found.held(method), found.ttft(method)])
    smallest = f"{100 * found.ratios[-1]:g} %"
    heads = ["method", *(SHORT[own_name(task)] for task in found.tasks), f"held at {smallest}", "TTFT s"]
    named = ", ".join(f"{SHORT[own_name(task)]}: `{own_name(task).partition(':')[2]}`" for task in found.tasks)
    said = paragraph(
        f"""RULER at {length_asked(EXAM):,} tokens, asked after compression,
        {found.setup}: score in percent at {shares} % of the context's bytes ({named};
        intervals: [docs/results.md](docs/results.md)). Held in the end, of the context's bytes, in brackets what
        presses that mask tokens would hold if each head stored its own. TTFT: one prompt, {found.threads}.
        {since_changed(EXAM)}"""
    )
    return "\n".join([said, "", *aligned(heads, lines), "", paragraph(_best_of_exam(found.rows))])


def exam_whole() -> str:
    """The same with every interval."""
    found = _Exam()
    places = [(task, ratio) for task in found.tasks for ratio in found.ratios]
    lines = []
    for method in found.methods:
        cells = [with_interval(found.row(method, task, None if method == FULL else ratio)) for task, ratio in places]
        lines.append([method, *cells, found.held(method), found.ttft(method)])
    heads = ["method", *(f"{own_name(task).partition(':')[2]}, {100 * ratio:g} %" for task, ratio in places)]
    heads += [f"bytes held at {100 * found.ratios[-1]:g} %", "TTFT s"]
    said = paragraph(
        f"""RULER at {length_asked(EXAM):,} tokens, the question read through what was left of the context,
        {found.setup}, score in percent with 95 % interval, by shares of the context's bytes. Bytes held are the
        true ones in the end, of the context's too: a press that masks tokens of single heads still stores them; in
        brackets is what they would be if every head were stored by itself. TTFT of one prompt of so many tokens, on an
        idle machine with {found.threads} (`results/{TIMES}`). {since_changed(EXAM)}"""
    )
    table = markdown_table(heads, lines, right=range(1, len(heads)))
    return "\n".join([said, "", *table, "", paragraph(_quantized_press(found))])


def _quantized_press(found: _Exam) -> str:
    """What can be shown of a press whose score may rise as its budget falls."""

    def by_budget(method: str, task: str, name: str, scale: float = 100.0) -> str:
        rows = (found.row(method, task, ratio) for ratio in found.ratios)
        return " / ".join(f"{scale * getattr(row, name):.0f}" for row in rows if row is not None)

    task, alone = found.tasks[0], QUANTIZED_PRESS.partition("+")[0]
    scores = [
        f"{by_budget(QUANTIZED_PRESS, task, 'score', 1.0)} on `{own_name(task).partition(':')[2]}`"
        for task in found.tasks
    ]
    seen, seen_alone = (_attended(found.row(method, task, found.ratios[-1])) for method in (QUANTIZED_PRESS, alone))
    check_said(f"{QUANTIZED_PRESS} attends to more tokens than the press alone", seen > seen_alone)
    return f"""Within the same bytes `{QUANTIZED_PRESS}` attends to more tokens than the press alone: by budgets to
        {by_budget(QUANTIZED_PRESS, task, "quantized_share")} % of all tokens quantized and
        {by_budget(QUANTIZED_PRESS, task, "original_share")} % not, the press alone to
        {by_budget(alone, task, "original_share")} % (`{own_name(task).partition(":")[2]}`). The others are masked,
        which leaves them stored, and their places are stored too, so that it holds more at smaller budgets. Why its
        scores go {" and ".join(scores)} as the quantized tokens become fewer is not explained."""


def _attended(row: Row | None) -> float:
    """Share of all tokens that are attended to."""
    shares = (row.original_share, row.quantized_share) if row is not None else (None,)
    return sum(known(share, "share of tokens of a press") for share in shares)


class _Exam:
    """The rows of the exam, by method, task and budget."""

    def __init__(self) -> None:
        self.rows = [row for row in rows_of(EXAM, "string_match") if row.part_of]
        self.ratios = sorted({row.cache_ratio for row in self.rows if row.cache_ratio is not None}, reverse=True)
        self.tasks = list(dict.fromkeys(row.task for row in self.rows))
        self.methods = list(dict.fromkeys(row.method for row in self.rows))
        self._cells = {(row.method, row.task, row.cache_ratio): row for row in self.rows}
        self._timings = [
            item
            for item in read_timings(RESULTS / TIMES / "speed.csv")
            if item.context_length == length_asked(EXAM) and item.batch_size == 1
        ]
        self.threads = threads_of(TIMES)
        self.setup = f"{model_of(EXAM)}, {self.rows[0].n} documents each"

    def row(self, method: str, task: str, ratio: float | None) -> Row | None:
        return self._cells.get((method, task, ratio))

    def held(self, method: str) -> str:
        """Bytes in the end at the smallest budget, of the context's; in brackets with every head by itself."""
        least = [row for row in self.rows if row.method == method and row.cache_ratio in (None, self.ratios[-1])]
        said = percent(fmean(known(row.kv_share_of_prompt, f"bytes that {method} holds") for row in least))
        if ragged := [share for row in least if (share := row.ragged_share_of_prompt) is not None]:
            said += f" ({percent(fmean(ragged))})"
        return said

    def ttft(self, method: str) -> str:
        """Median in seconds, at the smallest budget."""
        mine = [item for item in self._timings if item.method == method and item.cache_ratio in (None, self.ratios[-1])]
        times = [item.ttft_ms for item in mine if item.ttft_ms is not None]
        return seconds_text(median(times)) if times else ""


def _whole(row: Row | None) -> str:
    """A score without decimals, as wide as all others."""
    return f"{row.score:3.0f}" if row is not None else "   "


def _best_of_exam(rows: Sequence[Row]) -> str:
    """At the smallest budget, the best method and the next one of those that hold no more bytes than that."""
    ratio = least_budget(rows)
    said = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        best, second = sorted(rows_within(mine, ratio), key=lambda row: -row.score)[:2]
        full = next(row.score for row in mine if row.method == FULL)
        said.append(
            f"`{best.method}` scores {best.score:g} where the full cache has {full:g}, and the next best method "
            f"{second.score:g} ({ASKED[own_name(task)]})"
        )
        masked = [row for row in rows_at(mine, ratio) if row.ragged_share is not None and row.score >= best.score]
        said += [f"`{row.method}` has {row.score:g}, at the bytes in brackets" for row in masked]
    return f"Of methods that hold no more than {100 * ratio:g} % of the bytes, {'; '.join(said)}."
