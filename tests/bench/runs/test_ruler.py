"""RULER in a run: its rows, its average, and a run that is continued."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.names import RESULTS, SAMPLES
from scripts.recorded import tables
from tests.bench.conftest import read_lines, save_tiny_model
from tests.bench.runs.test_run import go

AFTER = " (question after)"


def test_rows_are_of_tasks_lengths_and_their_average(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", context=2048)
    settings = {
        "tasks": ("ruler:vt", "fwe"), "lengths": (1500, 1800), "samples": 1, "quant_type": ("mix",),
        "cache_ratio": (0.25,), "budget_unit": "bytes", "question": "after",
    }  # fmt: skip
    outcome, _ = go(model, tmp_path / "run", **settings)
    assert outcome.failures == []
    rows = {(row.task, row.metric, row.method): row for row in outcome.rows}
    names = ("string_match", "string_match,1500", "string_match,1800")
    tasks = ("ruler", "ruler:vt", "ruler:fwe")
    assert rows.keys() == {
        (task + AFTER, name, method) for task in tasks for name in names for method in ("full", "mix")
    }
    for name in names:
        mean = sum(rows[task + AFTER, name, "mix"].score for task in tasks[1:]) / 2
        assert rows["ruler" + AFTER, name, "mix"].score == pytest.approx(mean)
    assert [rows["ruler" + AFTER, name, "mix"].n for name in names] == [4, 2, 2]
    shortest, longest = (rows["ruler:vt" + AFTER, name, "full"] for name in names[1:])
    assert (shortest.prompt_tokens or 0) < 1500 < (longest.prompt_tokens or 0)
    assert rows["ruler" + AFTER, "string_match", "mix"].question == "after"
    assert tables(tmp_path / "run") == {RESULTS: (tmp_path / "run" / RESULTS).read_text()}
    for line in read_lines(tmp_path / "run" / SAMPLES):
        assert {"task", "length", "size"} <= line["info"].keys()

    lines = (tmp_path / "run" / SAMPLES).read_text().splitlines(keepends=True)
    (tmp_path / "run" / SAMPLES).write_text("".join(lines[:3]))
    again, _ = go(model, tmp_path / "run", **settings)
    assert again.measured == len(lines) - 3
    kept = {(row.task, row.metric, row.method): (row.score, row.n, row.kv_bytes_mean) for row in again.rows}
    assert kept == {key: (row.score, row.n, row.kv_bytes_mean) for key, row in rows.items()}
