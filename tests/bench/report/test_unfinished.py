"""A run that has not ended says how far it is, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.records.finished import read_runs
from bench.report.page import build
from tests.bench.report.test_page import make_run

ASKED: dict[str, Any] = {
    "finished": None,
    "command": "arkv-bench run --samples 3",
    "starts": [
        {"command": "arkv-bench run --samples 3"},
        {"command": "arkv-bench run --samples 3 --outdir 'old place' --fresh --lengths 900"},
    ],
    "cells": {"full-None": "full", "mix-512": "mix"},
    "models": {"tiny": {}},
    "tasks": {"needle": {"documents": 3}},
}


def reported(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((said.out + said.err).split())


def test_tables_and_page_end_with_the_command_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", **ASKED)
    again = f"arkv-bench run --samples 3 --lengths 900 --outdir {folder}"
    line = f"{folder} has not ended: 4 of the 6 answers are there that the tasks begun so far ask for. "
    line += f"Unless it is still running, go on with: {again}"
    for written in ([], ["--format", "markdown"]):
        code, said = reported(capsys, str(folder), *written)
        assert code == 0
        assert line in said.replace("\\_", "_")
    assert f'<p class="warning unfinished">{line}</p>' in build(read_runs([folder])).html


def test_a_run_without_a_table_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", **ASKED)
    (folder / "results.csv").unlink()
    code, said = reported(capsys, str(folder))
    assert code == 1
    assert "no task of the run has ended yet" in said
    assert "4 of the 6 answers" in said
    assert "is no run folder" not in said


def test_answers_of_more_than_is_asked_for_are_only_counted(tmp_path: Path) -> None:
    page = build(read_runs([make_run(tmp_path / "run", **{**ASKED, "tasks": {"needle": {"documents": 1}}})]))
    assert "has not ended: 4 answers are there. Unless" in page.html


def test_what_no_command_began_goes_on_by_itself(tmp_path: Path) -> None:
    page = build(read_runs([make_run(tmp_path / "run", **{**ASKED, "starts": [{"command": "mine.py -x"}]})]))
    assert "go on with: what began it (mine.py -x), with this folder" in page.html


def test_the_terminal_begins_with_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    said = reported(capsys, str(folder))[1]
    assert said.startswith("The answer ")
    assert said.index("the full cache scores") < said.index("needle, exact_match (higher is better)")
    _, said = reported(capsys, str(folder), str(make_run(tmp_path / "other")))
    assert "The answer, run " in said
    assert "The answer, other " in said


def test_a_run_that_has_ended_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    assert "has not ended" not in reported(capsys, str(folder))[1]
    assert 'unfinished"' not in build(read_runs([folder])).html
