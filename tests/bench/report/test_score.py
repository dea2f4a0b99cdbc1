"""``arkv-bench score`` on folders of any tool."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from bench.cli import main
from bench.errors import UserError
from bench.report.scores import score_folder


def write(path: Path, *predictions: str, length: int = 10, **changes: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"answers": ["Ann"], "all_classes": None, "length": length, **changes}
    path.write_text("".join(json.dumps({"pred": pred, **row}) + "\n" for pred in predictions), encoding="utf-8")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str, int]:
    with pytest.raises(SystemExit) as ended:
        main(["score", *arguments])
    captured = capsys.readouterr()
    return captured.out, captured.err, int(str(ended.value.code or 0))


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """``pred`` of the official scripts, with two models and a file that is none of theirs."""
    write(tmp_path / "llama" / "qasper.jsonl", "Ann", "", "Bob")
    write(tmp_path / "llama" / "hotpotqa.jsonl", "Ann", "Ann Lee")
    write(tmp_path / "qwen" / "qasper.jsonl", "Ann")
    (tmp_path / "qwen" / "notes.jsonl").write_text("{}\n")
    return tmp_path


def test_json_has_what_the_official_result_has(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err, code = call(capsys, str(official), "--format", "json")
    found = json.loads(out)
    assert found["llama"]["result"] == {"qasper": 33.33, "hotpotqa": 83.33}
    assert found["qwen"]["result"] == {"qasper": 100.0}
    assert found["llama"]["files"]["qasper"]["empty"] == 1
    assert found["llama"]["averages"]["All"] == {"score": pytest.approx(58.3333333), "datasets": 2, "of": 21}
    assert "ignored" in err
    assert "notes.jsonl" in err
    assert code == 0


def test_csv_and_markdown_have_a_line_for_each_file_and_average(
    official: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, _ = call(capsys, str(official), "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["folder"], row["dataset"], row["score"]) for row in rows[:3]] == [
        ("llama", "qasper", "33.33"),
        ("llama", "hotpotqa", "83.33"),
        ("llama", "average Single-doc QA", "33.33"),
    ]
    assert rows[2]["metric"] == "1 of 4 datasets"
    out, _, _ = call(capsys, str(official), "--format", "md")
    assert "| llama | qasper | qa_f1 | 3 | 33.33 | 1 | 0 |" in out.splitlines()
    out, _, _ = call(capsys, str(official))
    assert "hotpotqa" in out


def test_longbench_e(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "pred_e" / "full" / "qasper.jsonl", "Ann", length=5_000)
    write(tmp_path / "pred_e" / "full" / "lcc.jsonl", "Bob", length=9_000)
    out, _, _ = call(capsys, str(tmp_path), "--longbench-e", "--format", "json")
    found = json.loads(out)["full"]
    assert found["result"]["qasper"] == {"0-4k": None, "4-8k": 100.0, "8k+": None}
    assert found["averages"]["All"]["of"] == 13
    out, _, _ = call(capsys, str(tmp_path), "--longbench-e", "--format", "csv")
    last = list(csv.DictReader(io.StringIO(out)))[-1]
    assert (last["dataset"], last["0-4k"], last["4-8k"], last["8k+"]) == ("average All", "", "100.00", "0.00")
    with pytest.raises(UserError, match="has no pred, but pred_e: score it with --longbench-e"):
        score_folder(tmp_path)


def test_a_folder_of_files_itself(official: Path) -> None:
    folders, _ = score_folder(official / "llama")
    assert [folder.name for folder in folders] == ["llama"]


@pytest.mark.parametrize(
    "name, message, status",
    [
        ("missing", "is no folder: it does not exist", 2),
        ("empty", "holds no predictions", 1),
        ("odd", "treck.jsonl: did you mean trec", 1),
    ],
)
def test_nothing_to_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str, status: int
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "odd" / "treck.jsonl", "Ann")
    _, err, code = call(capsys, str(tmp_path / name))
    assert message in err
    assert code == status
    assert "Traceback" not in err


def test_a_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qasper.jsonl").write_text('{"pred": "a"}\n')
    _, err, code = call(capsys, str(tmp_path))
    assert f"{tmp_path / 'qasper.jsonl'}, line 1: no field 'answers'" in err
    assert code == 1
