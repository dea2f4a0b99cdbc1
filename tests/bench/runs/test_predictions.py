"""LongBench end to end on a tiny model: rows by dataset, files in the official form, and the same scores from those."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.report.averages import run_averages, together
from bench.report.scores import score_folder
from bench.runs.predictions import clear_predictions
from bench.runs.run import Outcome, execute
from bench.settings.run import RunConfig
from tests.bench.conftest import read_lines


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    row = {"input": "Type:", "context": "the river on Monday " * 40, "length": 5_000, "all_classes": None}
    for name, changes in {
        "trec": {"answers": ["Food"], "all_classes": ["Food", "the", "it"]},
        "triviaqa": {"answers": ["the river", "Monday"]},
        "lcc_e": {"answers": ["    return the"]},
    }.items():
        lines = [json.dumps({**row, **changes, "input": f"{n} {row['input']}"}) for n in range(3)]
        (folder / f"{name}.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    return folder


def go(model: Path, data_dir: Path, path: Path, **changes: Any) -> Outcome:
    settings: dict[str, Any] = {
        "model": (str(model),),
        "tasks": ("longbench:trec,triviaqa", "longbench-e:lcc"),
        "quant_type": ("full", "mix"),
        "cache_size": (64,),
        "window_size": (8,),
        "quant_format": ("int8",),
        "device": "cpu",
        "dtype": "float32",
        "max_length": 150,
        "limit": 2,
        "data_dir": data_dir,
        "question": "before",
    }
    return execute(RunConfig(**{**settings, **changes}), path, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def done(tiny_folder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    path = tmp_path_factory.mktemp("runs") / "longbench"
    return path, go(tiny_folder, data_dir, path)


def test_every_dataset_is_a_task(done: tuple[Path, Outcome]) -> None:
    path, outcome = done
    assert outcome.failures == []
    rows = {(row.task, row.metric): row for row in outcome.rows if row.method == "full"}
    assert list(rows) == [
        ("longbench:trec", "classification"),
        ("longbench:triviaqa", "qa_f1"),
        ("longbench-e:lcc", "code_sim"),
        ("longbench-e:lcc", "code_sim,4-8k"),
    ]
    assert {row.n for row in outcome.rows} == {2}
    samples = read_lines(path / "samples.jsonl")
    assert len(samples) == 3 * 2 * 2
    # The halves, put together, may have a token more or less.
    assert {sample["prompt_tokens"] for sample in samples} <= {149, 150, 151}
    assert all(sample["truncated"] for sample in samples)


def test_predictions_lie_in_the_official_form(done: tuple[Path, Outcome]) -> None:
    path, outcome = done
    mix = next(row.cell for row in outcome.rows if row.method == "mix")
    files = sorted(str(file.relative_to(path)) for file in path.glob("pred*/**/*.jsonl"))
    cells = ("full", mix)
    assert files == sorted(
        [f"pred/{cell}/{name}.jsonl" for cell in cells for name in ("trec", "triviaqa")]
        + [f"pred_e/{cell}/lcc.jsonl" for cell in cells]
    )
    lines = read_lines(path / "pred" / "full" / "trec.jsonl")
    samples = read_lines(path / "samples.jsonl")
    mine = [sample for sample in samples if (sample["task"], sample["cell"]) == ("longbench:trec", "full")]
    assert [line["pred"] for line in lines] == [sample["text"] for sample in mine]
    assert lines[0] | {"pred": ""} == {
        "pred": "",
        "answers": ["Food"],
        "all_classes": ["Food", "the", "it"],
        "length": 5_000,
    }


def test_the_files_score_as_the_run_does(done: tuple[Path, Outcome]) -> None:
    path, outcome = done
    for extended, prefix in ((False, "longbench"), (True, "longbench-e")):
        folders, ignored = score_folder(path, extended=extended)
        assert ignored == []
        for folder in folders:
            for file in folder.files:
                key = (f"{prefix}:{file.dataset.name}", file.dataset.metric, folder.name)
                (row,) = [row for row in outcome.rows if (row.task, row.metric, row.cell) == key]
                assert (file.score, file.n) == (row.score, row.n)


def test_averages_of_the_run(done: tuple[Path, Outcome]) -> None:
    _, outcome = done
    tables = run_averages(outcome.rows)
    assert [title for title, _ in tables] == ["longbench, averages, tiny", "longbench-e, averages, tiny"]
    header, full, mix = tables[0][1]
    assert header == ["budget", "method", "Few-shot", "English", "All"]
    scores = {row.task: row.score for row in outcome.rows if row.method == "full"}
    mean = (scores["longbench:trec"] + scores["longbench:triviaqa"]) / 2
    assert full == ["", "full", f"{mean:.2f} (2/4)", f"{mean:.2f} (2/14)", f"{mean:.2f} (2/21)"]
    assert mix[:2] == ["64", "mix int8"]
    # Of several runs, each line says which it is of.
    header, *lines = run_averages(together({"first": outcome.rows, "second": outcome.rows}))[0][1]
    assert header[:3] == ["run", "budget", "method"]
    assert [line[:3] for line in lines][::2] == [["first", "", "full"], ["second", "", "full"]]


def test_continuing_answers_nothing_twice(done: tuple[Path, Outcome], tiny_folder: Path, data_dir: Path) -> None:
    path, _ = done
    before = {file: file.read_bytes() for file in path.glob("pred*/**/*.jsonl")}
    next(iter(before)).unlink()
    assert go(tiny_folder, data_dir, path).measured == 0
    assert {file: file.read_bytes() for file in path.glob("pred*/**/*.jsonl")} == before


def test_a_dataset_without_rows_leaves_the_others_alone(tiny_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    outcome = go(tiny_folder, data_dir, tmp_path, tasks=("longbench:vcsum,trec",), limit=1)
    (failure,) = outcome.failures
    assert failure["task"] == "longbench:vcsum"
    assert "no vcsum.jsonl" in failure["error"]
    assert {row.task for row in outcome.rows} == {"longbench:trec"}


def test_clearing_removes_predictions_only(tmp_path: Path) -> None:
    for name in ("pred/full/trec.jsonl", "pred/full/notes.jsonl", "pred_e/full/lcc.jsonl", "pred/full/result.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_predictions(tmp_path)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"pred/full/notes.jsonl", "pred/full/result.json"}


def test_results_are_as_precise_as_published_ones(done: tuple[Path, Outcome]) -> None:
    path, outcome = done
    with open(path / "results.csv", newline="", encoding="utf-8") as file:
        written = [float(row["score"]) for row in csv.DictReader(file)]
    assert written == pytest.approx([row.score for row in outcome.rows], abs=5e-4)
