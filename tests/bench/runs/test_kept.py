"""What is added to a run's folder stands beside what was there: cells, documents and tasks of earlier starts."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.names import CURVE, RESULTS, SAMPLES
from bench.records.finished import read_runs
from bench.report.page import build
from tests.bench.conftest import read_lines
from tests.bench.runs.test_records import untimed
from tests.bench.runs.test_run import a_text, go, toys


def table(path: Path, name: str = RESULTS) -> list[dict[str, str]]:
    with open(path / name, newline="") as file:
        return list(csv.DictReader(file))


def by_cell(path: Path) -> list[dict[str, str]]:
    """Rows in an order that does not depend on when they came."""
    return sorted(untimed(path), key=lambda row: (row["task"], row["metric"], row["cell"]))


def test_a_method_that_is_added(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path / "run", quant_type=("full", "mix"))
    outcome, _ = go(tiny_folder, tmp_path / "run", quant_type=("origin",))
    assert outcome.measured == 3
    rows = table(tmp_path / "run")
    assert [row["method"] for row in rows] == ["full", "mix", "origin"]
    assert rows[2]["difference"] != "" != rows[2]["score_full"]
    go(tiny_folder, tmp_path / "once", quant_type=("full", "mix", "origin"))
    assert untimed(tmp_path / "run") == untimed(tmp_path / "once")


def test_a_length_that_is_added(tiny_folder: Path, tmp_path: Path) -> None:
    methods = ("full", "mix")
    go(tiny_folder, tmp_path / "run", lengths=(250,), quant_type=methods)
    outcome, _ = go(tiny_folder, tmp_path / "run", lengths=(300,), quant_type=methods)
    assert outcome.measured == 6
    go(tiny_folder, tmp_path / "once", lengths=(250, 300), quant_type=methods)
    assert by_cell(tmp_path / "run") == by_cell(tmp_path / "once")
    # A third start knows both.
    go(tiny_folder, tmp_path / "run", lengths=(200,), samples=3, quant_type=("full",))
    assert [(row["method"], row["n"]) for row in table(tmp_path / "run")] == [("full", "9"), ("mix", "6")]
    assert table(tmp_path / "run")[1]["difference"] != ""


def test_a_task_that_is_added(tiny_folder: Path, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt")
    settings = {"text": text, "lengths": (120,), "continuation": 8, "samples": 2, "quant_type": ("full", "mix")}
    go(tiny_folder, tmp_path, tasks=("fidelity",), **settings)
    rows, curve = table(tmp_path), table(tmp_path, CURVE)
    go(tiny_folder, tmp_path, tasks=("needle",), **settings)
    assert {row["task"] for row in table(tmp_path)} == {"fidelity", "needle"}
    assert [row for row in table(tmp_path) if row["task"] == "fidelity"] == rows
    assert table(tmp_path, CURVE) == curve
    # And fresh forgets.
    go(tiny_folder, tmp_path, tasks=("needle",), fresh=True, **settings)
    assert {row["task"] for row in table(tmp_path)} == {"needle"}


def test_fewer_documents_take_none_away(tiny_folder: Path, tmp_path: Path) -> None:
    """And the page's figures are of the documents of its table."""
    text = a_text(tmp_path / "text.txt")
    settings = {"tasks": ("fidelity",), "text": text, "lengths": (120,), "continuation": 8, "samples": 6}
    go(tiny_folder, tmp_path / "run", **settings)
    rows = untimed(tmp_path / "run")
    outcome, _ = go(tiny_folder, tmp_path / "run", limit=2, **settings)
    assert outcome.measured == 0
    assert untimed(tmp_path / "run") == rows
    assert {row["n"] for row in rows} == {"6"}
    captions = re.findall(r"Mean over (\d+) prompts", build(read_runs([tmp_path / "run"])).html)
    assert set(captions) == {"6"}


def test_documents_asked_anew_in_another_way(tiny_folder: Path, tmp_path: Path) -> None:
    """Of a document with two prompts, table and figures take the one that was asked last."""
    text = a_text(tmp_path / "text.txt")
    settings = {"tasks": ("fidelity",), "text": text, "lengths": (120,), "continuation": 8, "samples": 2}
    go(tiny_folder, tmp_path / "run", **settings)
    go(tiny_folder, tmp_path / "run", per_layer=True, **settings)
    assert len(read_lines(tmp_path / "run" / SAMPLES)) == 12
    assert {row["n"] for row in table(tmp_path / "run")} == {"2"}
    captions = re.findall(r"Mean over (\d+) prompts", build(read_runs([tmp_path / "run"])).html)
    assert set(captions) == {"2"}


def test_documents_of_lm_eval(tiny_folder: Path, tmp_path: Path) -> None:
    """Its scores are of a whole set, such as a perplexity: documents of both starts are scored together."""
    settings = {**toys(tmp_path / "toys"), "tasks": ("toy_west", "toy_text")}
    go(tiny_folder, tmp_path / "once", **settings, quant_type=("full", "mix"))
    go(tiny_folder, tmp_path / "run", **settings, quant_type=("full", "mix"))
    go(tiny_folder, tmp_path / "run", **settings, quant_type=("full", "origin"), limit=1)
    rows = untimed(tmp_path / "run")
    kept = [row for row in rows if row["method"] != "origin"]
    alone = untimed(tmp_path / "once")
    for name in ("score", "score_full", "difference", "n", "kv_bytes_mean"):
        assert [row[name] for row in kept] == [row[name] for row in alone]
    added = [row for row in rows if row["method"] == "origin"]
    assert {row["n"] for row in added} == {"1"}
    assert all(row["score_full"] for row in added), "compared with full on its own documents"


def test_documents_that_cannot_be_made_again(tiny_folder: Path, tmp_path: Path) -> None:
    """Their answers stay in the folder, and it is said that the table is without them."""
    settings = toys(tmp_path / "toys")
    go(tiny_folder, tmp_path / "run", **settings)
    document = read_lines(tmp_path / "run" / SAMPLES)[-1]["document"]
    samples = tmp_path / "run" / SAMPLES
    samples.write_text(samples.read_text().replace(f'"{document}"', '"toy_text-9"'))
    _, said = go(tiny_folder, tmp_path / "run", **settings)
    assert "toy_text: 1 documents of earlier starts are not in its results: their prompts have changed" in said


def test_rows_over_other_documents_say_so(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path, lengths=(250,), quant_type=("full", "mix"))
    go(tiny_folder, tmp_path, lengths=(300,), quant_type=("full", "origin"))
    rows = {row["method"]: row for row in table(tmp_path)}
    assert {method: row["n"] for method, row in rows.items()} == {"full": "6", "mix": "3", "origin": "3"}
    html = build(read_runs([tmp_path])).html
    assert "the rows are over different numbers of documents" in html


def times(row: dict[str, Any]) -> list[str]:
    return [row[name] for name in ("prefill_s", "ttft_ms", "tpot_ms")]


def test_times_of_different_starts_are_not_mixed(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path, quant_type=("full", "mix"), limit=2)
    before = table(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        go(tiny_folder, tmp_path, quant_type=("full", "mix"))
        go(tiny_folder, tmp_path, quant_type=("origin",))
    finally:
        torch.set_num_threads(threads)
    full, mix, origin = table(tmp_path)
    # 4 answers under the first terms, 5 under the others.
    assert [(row["n"], row["timed_documents"]) for row in (full, mix, origin)] == [("3", "1"), ("3", "1"), ("3", "3")]
    third = [line for line in read_lines(tmp_path / SAMPLES) if line["start"] == 1 and line["method"] == "full"]
    assert float(full["prefill_s"]) == pytest.approx(third[0]["prefill_s"], rel=1e-5)
    assert times(full) != times(before[0])
    assert "times are over 1 to 3 of 3 documents" in build(read_runs([tmp_path])).html


def test_a_method_without_times_under_the_same_terms(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path, quant_type=("full", "mix"), batch_size="1")
    before = table(tmp_path)
    go(tiny_folder, tmp_path, quant_type=("origin",), batch_size="2")
    full, mix, origin = table(tmp_path)
    assert [times(row) for row in (full, mix)] == [times(row) for row in before]
    assert times(origin) == ["", "", ""]
    assert origin["timed_documents"] == "0"
    assert origin["score"] != ""
