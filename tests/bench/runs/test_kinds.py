"""What a folder holds, and which run is the newest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.cli import main
from bench.errors import UserError
from bench.names import RECORD, RESULTS, SAMPLES, SPEED
from bench.runs.kinds import INSPECTION, RUN, SEARCH, TIMINGS, claim, kind_of, newest_run


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"content of {name}\n")
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ([], None),
        (["notes.txt"], None),
        ([RECORD], RUN),
        ([SAMPLES, RECORD], RUN),
        ([SPEED, RECORD], TIMINGS),
        (["inspect.json", "states.json"], INSPECTION),
        (["study.jsonl"], SEARCH),
        (["study.db"], SEARCH),
    ],
)
def test_kinds(tmp_path: Path, names: list[str], kind: str | None) -> None:
    folder = make(tmp_path / "folder", *names)
    assert kind_of(folder) == kind
    for mine in (RUN, TIMINGS, INSPECTION, SEARCH):
        if kind in (None, mine):
            claim(folder, mine)
        else:
            with pytest.raises(UserError, match=r"holds .*: give another --outdir"):
                claim(folder, mine)


def test_the_newest_run_is_the_one_written_to_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "old", SAMPLES, RESULTS)
    make(tmp_path / "runs" / "group" / "new", SAMPLES)
    make(tmp_path / "runs" / "timed", SPEED, RECORD)
    for place, name in enumerate(["old/results.csv", "old/samples.jsonl", "group/new/samples.jsonl"]):
        os.utime(tmp_path / "runs" / name, (1000 + place, 1000 + place))
    assert newest_run() == Path("runs/group/new")
    os.utime(tmp_path / "runs/old/results.csv", (2000, 2000))
    assert newest_run() == Path("runs/old")


def test_without_any_run_a_line_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no run under .*arkv-bench run --preset demo"):
        newest_run()


@pytest.mark.parametrize(
    ("line", "held"),
    [
        (["speed", "--context-lengths", "64", "--cache-size", "40"], [SAMPLES, RECORD, RESULTS]),
        (["inspect", "--task", "needle"], [SAMPLES, RECORD, RESULTS, "states.json"]),
        (["tune", "--n-trials", "1"], [SAMPLES, RECORD, RESULTS]),
        (["run", "--tasks", "needle"], [SPEED, RECORD]),
        (["run", "--tasks", "needle", "--fresh"], [SPEED, RECORD]),
    ],
)
def test_no_command_writes_over_what_another_one_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str], held: list[str]
) -> None:
    folder = make(tmp_path / "held", *held)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as caught:
        main([*line, "--outdir", str(folder)])
    assert caught.value.code == 2
    assert "give another --outdir" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
