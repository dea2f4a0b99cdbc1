"""Prediction files of any tool: scored as officially, and what is wrong with them is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.base import TaskError
from tasks.longbench.predictions import dataset_of, score_file


def write(path: Path, *rows: dict[str, Any]) -> Path:
    lines = [json.dumps({"answers": ["Ann"], "all_classes": None, "length": 10, **row}) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "qasper.jsonl", {"pred": "Ann"}, {"pred": " "}, {"pred": "x", "answers": []})
    found = score_file(path)
    assert (found.dataset.name, found.n, found.empty, found.unanswerable) == ("qasper", 3, 1, 1)
    assert found.score == pytest.approx(100 / 3)
    assert found.buckets == {}


def test_by_length(tmp_path: Path) -> None:
    path = write(tmp_path / "qasper.jsonl", {"pred": "Ann"}, {"pred": "no", "length": 9_000})
    assert score_file(path, extended=True).buckets == {"0-4k": 100.0, "8k+": 0.0}
    path = write(tmp_path / "trec.jsonl", {"pred": "a", "all_classes": ["a"], "length": None})
    assert score_file(path).n == 1
    with pytest.raises(TaskError, match=r"trec\.jsonl, line 1: no field 'length'"):
        score_file(path, extended=True)


def test_the_classes_of_the_last_row_hold_for_all(tmp_path: Path) -> None:
    rows = [{"pred": "a b", "answers": ["a"], "all_classes": classes} for classes in (["a"], ["a", "b"])]
    assert score_file(write(tmp_path / "trec.jsonl", *rows)).score == 50.0
    assert score_file(write(tmp_path / "trec.jsonl", *rows[::-1])).score == 100.0


def test_the_first_line_counts_where_examples_go_on(tmp_path: Path) -> None:
    row = {"pred": "\nAnn\nDialogue: Bob"}
    assert score_file(write(tmp_path / "triviaqa.jsonl", row)).score == 100.0
    assert score_file(write(tmp_path / "qasper.jsonl", row)).score == 50.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("{", "not JSON"),
        ('{"answers": ["a"]}', "no field 'pred'"),
        ('{"pred": null, "answers": ["a"]}', "'pred' must be a text"),
        ('{"pred": "a"}', "no field 'answers'"),
        ('{"pred": "a", "answers": [1]}', "'answers' must be a list of texts"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, wrong: str, message: str) -> None:
    path = write(tmp_path / "qasper.jsonl", {"pred": "Ann"})
    path.write_text(path.read_text(encoding="utf-8") + "\r\n" + wrong, encoding="utf-8")
    with pytest.raises(TaskError, match=rf"qasper\.jsonl, line 2: .*{message}"):
        score_file(path)


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has no predictions"):
        score_file(write(tmp_path / "qasper.jsonl"))


def test_a_file_is_named_after_its_dataset() -> None:
    assert dataset_of(Path("pred/repobench-p.jsonl")) == "repobench-p"
    assert dataset_of(Path("trec.part1.jsonl")) == "trec"
