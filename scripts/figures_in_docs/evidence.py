"""RULER at the field's length, and rows of LongBench: every task, what is kept of the full mean, and the bytes."""

from __future__ import annotations

from statistics import fmean

import numpy as np

from bench.judge.retention import ratio_interval
from bench.names import FULL, own_name
from bench.records.files.markdown import markdown_table
from bench.records.finished import read_runs
from bench.records.row import Row
from scripts.figures_in_docs.common import (
    RESULTS,
    in_words,
    known,
    length_asked,
    model_of,
    paragraph,
    percent,
    rows_of,
    settings_of,
    since_changed,
    the_row,
    with_interval,
)

RULER, LONGBENCH, GSM8K_REPLAY = "evidence/ruler", "evidence/longbench", "evidence/gsm8k-replay"
STRICT = "exact_match,strict-match"


def ruler() -> str:
    """All tasks at all budgets."""
    rows = rows_of(RULER, "string_match")
    whole = {(row.method, row.cache_ratio): row for row in rows if row.part_of is None}
    parts = [row for row in rows if row.part_of is not None]
    tasks = list(dict.fromkeys(row.task for row in parts))
    scores = {(row.method, row.cache_ratio, row.task): row for row in parts}
    lines = []
    for (method, ratio), mean in whole.items():
        lines.append(
            [
                method,
                "" if ratio is None else f"{100 * ratio:g} %",
                *(f"{scores[method, ratio, task].score:.0f}" for task in tasks),
                with_interval(mean),
                "" if method == FULL else kept(mean.retention, mean.retention_low, mean.retention_high),
                percent(mean.kv_share_of_prompt),
            ]
        )
    said = paragraph(
        f"""RULER at {length_asked(RULER):,} tokens, the question read through what was left of the context,
        {model_of(RULER)}, {parts[0].n} documents of each task: score in percent at a share of the context's bytes, the
        mean of all tasks with 95 % interval, what is kept of the full cache's mean, and the bytes held in the end
        (`results/{RULER}`, {in_words(len(tasks))} of the six tasks of the preset `evidence-exam`).
        {since_changed(RULER)}"""
    )
    heads = ["method", "budget", *(own_name(task).partition(":")[2] for task in tasks), "mean", "kept", "bytes held"]
    return "\n".join([said, "", *markdown_table(heads, lines, right=range(1, len(heads)))])


def longbench() -> str:
    """All datasets at a quarter of the bytes."""
    found = LongBench()
    lines = []
    for method in found.methods:
        mine = [found.row(method, task) for task in found.sizes]
        lines.append(
            [
                method,
                *(f"{row.score:.0f}" for row in mine),
                f"{fmean(row.score for row in mine):.1f}",
                "" if method == FULL else kept(*found.kept(method)),
                "" if method == FULL else kept(*found.kept(method, by_document=True)),
                percent(fmean(known(row.kv_share_of_prompt, "bytes held") for row in mine)),
            ]
        )
    counts = {own_name(task).partition(":")[2]: n for task, n in found.sizes.items()}
    longest = settings_of(LONGBENCH)["max_length"]
    said = paragraph(
        f"""LongBench, rows of up to {longest:,} tokens ({", ".join(f"{name} {n}" for name, n in counts.items())}), the
        question read through what was left of the context, {model_of(LONGBENCH)}: score at a quarter of the context's
        bytes, the mean of all datasets, what is kept of the full cache's with 95 % interval, where each dataset and
        where each document weighs the same (some datasets have few rows that are so short), and the bytes held in the
        end (`results/{LONGBENCH}`, preset `evidence-longbench`):"""
    )
    heads = ["method", *counts, "mean", "kept", "by document", "bytes held"]
    return "\n".join([said, "", *markdown_table(heads, lines, right=range(1, len(heads)))])


class LongBench:
    """The rows of LongBench and their samples, read once."""

    def __init__(self) -> None:
        (run,) = read_runs([RESULTS / LONGBENCH])
        self._rows = {(row.method, row.task): row for row in run.rows if row.part_of is not None}
        self.methods = list(dict.fromkeys(method for method, _ in self._rows))
        self.sizes = {task: row.n for (_, task), row in self._rows.items()}
        """Documents of each dataset."""
        cells = {(row.task, row.cell): row for row in self._rows.values()}
        self._scores: dict[str, dict[tuple[str, str], float]] = {method: {} for method in self.methods}
        """Of each method by dataset and document."""
        for sample in run.samples.values():
            row = cells[sample.task, sample.cell]
            score = known(sample.scores[row.metric], f"score of {sample.document} with {row.method}")
            self._scores[row.method][sample.task, sample.document] = score

    def row(self, method: str, task: str) -> Row:
        """The row of a method on one dataset."""
        return self._rows[method, task]

    def kept(self, method: str, *, by_document: bool = False) -> tuple[float, float, float]:
        """Share of the full cache's mean, and the ends of its 95 % interval. Each dataset weighs the same, as in
        LongBench's own averages, or each document."""
        documents = list(self._scores[FULL])
        weights = np.array([1.0 if by_document else 1.0 / self.sizes[task] for task, _ in documents])
        mine, full = (
            weights * np.array([self._scores[name][document] for document in documents]) for name in (method, FULL)
        )
        interval = known(ratio_interval(mine, full), f"interval of what {method} keeps of LongBench")
        return float(mine.sum() / full.sum()), interval.low, interval.high


def kept(share: float | None, low: float | None, high: float | None) -> str:
    """A share with the ends of its interval."""
    ends = ", ".join(percent(end, 0).removesuffix(" %") for end in (low, high) if end is not None)
    return f"{percent(share, 0)} [{ends}]" if ends else percent(share, 0)


def gsm8k_replay() -> str:
    """The second reading, in a run of its own beside the full cache."""
    rows = rows_of(GSM8K_REPLAY, STRICT)
    full = the_row(rows, FULL)
    said = []
    for row in rows:
        if row.method == FULL:
            continue
        low, high = (known(end, "end of a difference") for end in (row.difference_low, row.difference_high))
        ratio = known(row.cache_ratio, "budget")
        said.append(
            f"{100 * row.score:g} % in {100 * ratio:g} % of the bytes ([{100 * low:+.0f}, {100 * high:+.0f}] points)"
        )
    return paragraph(
        f"""`mix-replay`, in a run of its own on the first {full.n} of these questions: {", ".join(said)}, where the
        full cache has {100 * full.score:g} % (`results/{GSM8K_REPLAY}`). {since_changed(GSM8K_REPLAY)}"""
    )
