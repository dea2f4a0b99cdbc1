"""RULER at the field's length, and rows of LongBench: every task, what is kept of the full mean, and the bytes."""

from __future__ import annotations

import numpy as np

from bench.judge.retention import ratio_interval
from bench.names import FULL, own_name
from bench.records.files.markdown import markdown_table
from bench.records.finished import read_runs
from bench.records.row import Row, read_results
from scripts.figures_in_docs.common import (
    RESULTS,
    in_words,
    length_asked,
    model_of,
    paragraph,
    percent,
    the_row,
    with_interval,
)

RULER, LONGBENCH, GSM8K_REPLAY = "evidence/ruler", "evidence/longbench", "evidence/gsm8k-replay"
STRICT = "exact_match,strict-match"


def ruler() -> str:
    """All tasks at all budgets."""
    rows = [row for row in read_results(RESULTS / RULER) if row.metric == "string_match"]
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
        (`results/{RULER}`, {in_words(len(tasks))} of the six tasks of the preset `evidence-exam`):"""
    )
    heads = ["method", "budget", *(own_name(task).partition(":")[2] for task in tasks), "mean", "kept", "bytes held"]
    return "\n".join([said, "", *markdown_table(heads, lines, right=range(1, len(heads)))])


def longbench() -> str:
    """All datasets at a quarter of the bytes."""
    parts = _of_longbench()
    tasks = list(dict.fromkeys(row.task for row in parts))
    scores = {(row.method, row.task): row for row in parts}
    lines = []
    for method in dict.fromkeys(row.method for row in parts):
        mine = [scores[method, task] for task in tasks]
        lines.append(
            [
                method,
                *(f"{row.score:.0f}" for row in mine),
                f"{np.mean([row.score for row in mine]):.1f}",
                "" if method == FULL else kept(*kept_of_longbench(method)),
                "" if method == FULL else kept(*kept_of_longbench(method, by_document=True)),
                percent(float(np.mean([row.kv_share_of_prompt or 0.0 for row in mine]))),
            ]
        )
    counts = {own_name(row.task).partition(":")[2]: row.n for row in parts}
    said = paragraph(
        f"""LongBench, rows of up to 8,192 tokens ({", ".join(f"{name} {n}" for name, n in counts.items())}), the
        question read through what was left of the context, {model_of(LONGBENCH)}: score at a quarter of the context's
        bytes, the mean of all datasets, what is kept of the full cache's with 95 % interval, where each dataset and
        where each document weighs the same (some datasets have few rows that are so short), and the bytes held in the
        end (`results/{LONGBENCH}`, preset `evidence-longbench`):"""
    )
    heads = ["method", *counts, "mean", "kept", "by document", "bytes held"]
    return "\n".join([said, "", *markdown_table(heads, lines, right=range(1, len(heads)))])


def kept_of_longbench(method: str, *, by_document: bool = False) -> tuple[float, float, float]:
    """Share of the full cache's mean, and the ends of its 95 % interval. Each dataset weighs the same, as in
    LongBench's own averages, or each document."""
    parts = _of_longbench()
    metrics = {row.task: row.metric for row in parts}
    cells = {name: {row.task: row.cell for row in parts if row.method == name} for name in (method, FULL)}
    (run,) = read_runs([RESULTS / LONGBENCH])
    found: dict[str, dict[tuple[str, str], float]] = {FULL: {}, method: {}}
    for sample in run.samples.values():
        for name, of_task in cells.items():
            if of_task[sample.task] == sample.cell:
                score = sample.scores[metrics[sample.task]]
                assert score is not None, "an unknown score is none of 0"
                found[name][sample.task, sample.document] = score
    documents = list(found[FULL])
    sizes = {row.task: row.n for row in parts}
    weights = np.array([1.0 if by_document else 1.0 / sizes[task] for task, _ in documents])
    mine, full = (weights * np.array([found[name][document] for document in documents]) for name in (method, FULL))
    interval = ratio_interval(mine, full)
    assert interval is not None
    return float(mine.sum() / full.sum()), interval.low, interval.high


def _of_longbench() -> list[Row]:
    return [row for row in read_results(RESULTS / LONGBENCH) if row.part_of is not None]


def kept(share: float | None, low: float | None, high: float | None) -> str:
    """A share with the ends of its interval."""
    ends = ", ".join(percent(end, 0).removesuffix(" %") for end in (low, high) if end is not None)
    return f"{percent(share, 0)} [{ends}]" if ends else percent(share, 0)


def gsm8k_replay() -> str:
    """The second reading, in a run of its own beside the full cache."""
    rows = [row for row in read_results(RESULTS / GSM8K_REPLAY) if row.metric == STRICT]
    full = the_row(rows, FULL)
    said = []
    for row in rows:
        if row.method == FULL:
            continue
        assert row.difference_low is not None
        assert row.difference_high is not None
        ends = f"[{100 * row.difference_low:+.0f}, {100 * row.difference_high:+.0f}]"
        said.append(f"{100 * row.score:g} % in {100 * (row.cache_ratio or 0.0):g} % of the bytes ({ends} points)")
    return paragraph(
        f"""`mix-replay`, in a run of its own on the first {full.n} of these questions: {", ".join(said)}, where the
        full cache has {100 * full.score:g} % (`results/{GSM8K_REPLAY}`)."""
    )
