"""What a report prints first, and what it keeps for the details; all of it within 80 columns."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from bench.records.finished import Run
from bench.records.record import Fingerprint, Record
from bench.records.row import Row
from bench.report.averages import print_averages
from bench.report.columns import LEGEND, SHORT_LEGEND
from bench.report.terminal import SHORT_TABLES, print_runs
from tasks.longbench.datasets import DATASETS
from tests.bench.report.test_report import ROWS, row


def printed(*runs: Run, width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_runs(runs, [run.rows for run in runs], console, **options)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return str(text)


def words(text: str) -> str:
    return " ".join(text.split())


def of(rows: Sequence[Row], **changed: Any) -> list[Row]:
    return [one.model_copy(update=changed) for one in rows]


def test_first_the_answer_and_a_line_per_row_of_the_first_metric() -> None:
    run = Run(name="a", rows=[*ROWS, *of(ROWS, metric="f1")])
    text = printed(run)
    assert text.index("The answer") < text.index("needle, exact_match")
    assert "needle, f1" not in text
    (mix,) = [line for line in text.splitlines() if line.split()[:2] == ["512", "mix"]]
    assert mix.split() == ["512", "mix", "int8", "0.875", "[0.78,", "0.97]", "tied", "25.0", "%", "3.21", "123.5"]
    assert [line for line in SHORT_LEGEND if line not in words(text)] == []
    assert LEGEND[0] not in words(text)
    everything = words(printed(run, details=True))
    assert "needle, f1" in everything
    assert "20/5/75" in everything
    assert [line for line in LEGEND if line not in everything] == []


def test_names_that_leave_no_room_cost_the_interval_first() -> None:
    text = printed(Run(name="a", rows=[*ROWS, row("kvpress:expected_attention", 0.5, window_size=None)]))
    assert "kvpress:expected_attention" in text
    table = text[text.index("needle, exact_match") :]
    assert "[0.78, 0.97]" not in table
    assert "TPOT" in table


def test_what_changes_how_a_row_is_read_stands_below_the_short_table_too() -> None:
    bytes_ = {"budget_unit": "bytes", "cache_size": None, "cache_ratio": 0.125, "question": "after"}
    masked = row("kvpress:kvzip", 0.5, **bytes_, kv_share_of_prompt=1.1, ragged_share=0.12)
    idle = row("mix", 1.0, **bytes_, compressed_documents=0, n=7, truncated_documents=2)
    text = words(printed(Run(name="a", rows=[row("full", 1.0), masked, idle])))
    for said in (
        "- question after: the context was compressed without it",
        "- not exercised: every prompt and answer fits the budget",
        "- * not the bytes asked for: kvpress:kvzip - in brackets: what a method that only masks",
        "- 2 prompts were longer than the context",
        "- the rows are over different numbers of documents",
    ):
        assert said in text


def test_of_many_tasks_only_the_answer_and_how_many_tables_there_are() -> None:
    few = [one for number in range(SHORT_TABLES) for one in of(ROWS, task=f"task-{number}")]
    assert printed(Run(name="a", rows=few)).count("exact_match (higher is better)") == SHORT_TABLES
    many = Run(name="a", rows=[*few, *ROWS])
    assert f"{SHORT_TABLES + 1} tables, one for each task, stand in the details" in words(printed(many))
    assert printed(many, details=True).count("exact_match (higher is better)") == SHORT_TABLES + 1


def test_each_of_several_runs_says_what_its_times_are_of() -> None:
    def run(name: str, threads: int | None) -> Run:
        known = Record(fingerprint=Fingerprint(), hardware={"cpu": "EPYC", "torch_threads": threads} if threads else {})
        return Run(name=name, rows=ROWS, record=known)

    for details in (False, True):
        assert "Times: EPYC, 2 threads." in printed(run("a", 2), run("b", 2), details=details)
        said = words(printed(run("a", 1), run("b", 2), details=details))
        assert "Times: a: EPYC, 1 thread; b: EPYC, 2 threads." in said
        assert "Times: a: EPYC, 1 thread." in printed(run("a", 1), run("b", None), details=details)
        assert "Times:" not in printed(run("a", None), details=details)


@pytest.mark.parametrize("run", [None, "a run with a long name"])
def test_averages_of_all_datasets_fit_80_columns(run: str | None) -> None:
    rows = [
        one.model_copy(update={"task": f"longbench:{name}", "metric": task.metric, "run": run})
        for name, task in DATASETS.items()
        for one in (row("full", 41.25), row("mix-replay", 38.5), row("kvpress:kvzip+quanto-int4", 17.125))
        if (name, one.method) != ("lcc", "mix-replay")
    ]
    console = Console(file=io.StringIO(), width=80)
    print_averages(rows, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert run is None or run in lines[1]
    (full,) = [line for line in lines if line.split()[:1] == ["full"]]
    assert full.split() == ["full", *["41.25"] * 9]
    assert sum("(20/21)" in line for line in lines) == 1
