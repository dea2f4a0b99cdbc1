"""Runs with the question behind its context, inside it, and both: two tasks that nothing takes for one another."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.engine.steps import Steps
from bench.errors import UserError
from bench.gate.comparing import check
from bench.gate.findings import Tolerances
from bench.gate.reading import read
from bench.methods.questions import AskedAfter, AskedAfterGroup, behind
from bench.names import RESULTS, SAMPLES
from bench.records.row import Row, read_results
from bench.report.comparison import compare
from bench.settings.presets import preset_names, resolve
from bench.settings.run import RunConfig
from tasks.base import Evaluation, TaskSettings
from tasks.longbench.task import LongBench
from tasks.needle import NeedleTask
from tests.bench.conftest import define_toys, read_lines
from tests.bench.runs.test_run import go

AFTER = "needle (question after)"
UNTIMED = {"prefill_s", "compress_s", "ttft_ms", "question_s", "decode_s", "tpot_ms", "decode_tokens_per_s"}


@pytest.fixture(scope="module")
def both(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("runs") / "both"
    outcome, said = go(tiny_folder, path, tasks=("needle", "fidelity"), continuation=4, question="both", samples=6)
    assert outcome.failures == []
    return path, said


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with the question at one place, by that place."""
    folder = tmp_path_factory.mktemp("alone")
    for question in ("before", "after"):
        go(tiny_folder, folder / question, question=question, samples=6)
    return {question: folder / question for question in ("before", "after")}


def call(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


def untimed(path: Path, task: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in UNTIMED}
        for line in read_lines(path / SAMPLES)
        if line["task"] == task
    ]


def test_both_are_two_tasks_with_the_same_tokens(both: tuple[Path, str], alone: dict[str, Path]) -> None:
    path, _ = both
    lines = read_lines(path / SAMPLES)
    assert {(line["task"], line["question"]) for line in lines} == {
        ("needle", "before"),
        (AFTER, "after"),
        ("fidelity", None),
    }
    full = {
        task: {line["document"]: line for line in untimed(path, task) if line["method"] == "full"}
        for task in ("needle", AFTER)
    }
    for name, before in full["needle"].items():
        after = full[AFTER][name]
        assert after["token_ids"] == before["token_ids"]
        assert after["prompt_tokens"] == before["prompt_tokens"] == before["context_tokens"] > after["context_tokens"]
        assert after["prompt_sha256"] != before["prompt_sha256"]
    # Each kind alone leaves what it leaves beside the other.
    for question, task in (("before", "needle"), ("after", AFTER)):
        assert untimed(alone[question], task) == untimed(path, task)


def test_every_table_says_which_it_was(both: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = both
    with open(path / RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["question"]) for row in rows} >= {("needle", "before"), (AFTER, "after")}
    assert {row["question"] for row in rows if row["task"] == "fidelity"} == {""}
    for row in rows:
        # Compared with full of the same kind, on six documents.
        assert row["n"] == "6"
    titles = {item.title.partition(",")[0]: item.notes for item in compare(read_results(path))}
    assert any("compressed without it" in note for note in titles[AFTER])
    assert any("part of the prompt" in note for note in titles["needle"])
    assert not any("question" in note for note in titles["fidelity"])
    for form in ("markdown", "csv"):
        call("report", str(path), "--format", form)
        assert AFTER in capsys.readouterr().out
    page = path.parent / "page.html"
    call("report", str(path), "--html", str(page))
    assert AFTER in page.read_text(encoding="utf-8")


def test_after_is_the_default_and_a_task_without_parts_is_asked_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    assert RunConfig().question == "after"
    outcome, said = go(tiny_folder, tmp_path, tasks=("needle", "fidelity"), continuation=4, samples=1, question="after")
    assert {row.task for row in outcome.rows} == {AFTER, "fidelity"}
    assert "fidelity: --question" not in said, "nobody asked for it"


@pytest.mark.parametrize("question", ["after", "both"])
def test_a_task_without_parts_is_named_where_it_was_asked_for(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    options = ["--device", "cpu", "--dtype", "float32", "--lengths", "120", "--samples", "1", "--continuation", "4"]
    common = ["run", "--model", str(tiny_folder), "--tasks", "fidelity", "--methods", "full", *options]
    call(*common, "--question", question, "--outdir", str(tmp_path / "run"))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"fidelity: --question {question}: the task tells no question from its context") == 1
    assert {row.task for row in read_results(tmp_path / "run")} == {"fidelity"}


def test_lm_evals_choices_without_parts_say_that_the_question_is_inside(tiny_folder: Path, tmp_path: Path) -> None:
    tasks, data = define_toys(tmp_path / "toys")
    settings = {"include_path": (str(tasks),), "data_dir": data, "question": "after", "num_fewshot": 0}
    outcome, _ = go(tiny_folder, tmp_path / "run", tasks=("toy_east", "toy_text"), **settings)
    assert {(row.task, row.question) for row in outcome.rows} == {("toy_east", "inside"), ("toy_text", None)}


def test_the_gate_never_takes_one_kind_for_the_other(both: tuple[Path, str], alone: dict[str, Path]) -> None:
    path, _ = both
    after, before = alone["after"], alone["before"]
    with pytest.raises(UserError, match="have nothing in common"):
        check(read(after), read(before), Tolerances(judge_speed=False))
    assert not check(read(path), read(after), Tolerances(judge_speed=False)).failed
    assert not check(read(path), read(before), Tolerances(judge_speed=False)).failed


def test_questions_to_one_context_go_together(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one by one: the documents of a context are one unit of work, with one prefill."""
    load = NeedleTask.load

    def thrice(self: NeedleTask, settings: TaskSettings) -> list[Any]:
        from dataclasses import replace

        return [
            replace(document, id=f"{document.id}-{n}", request=replace(document.request, question_ids=(5 + n, 6, 7)))
            for n in range(3)
            for document in load(self, settings)
        ]

    prefilled = []
    prefill = Steps.prefill

    def counting(self: Steps, contexts: Any) -> Any:
        prefilled.extend(contexts)
        return prefill(self, contexts)

    monkeypatch.setattr(NeedleTask, "load", thrice)
    monkeypatch.setattr(Steps, "prefill", counting)
    outcome, _ = go(tiny_folder, tmp_path, question="after", samples=2)
    assert outcome.measured == 2 * 3 * 3
    of_documents = [ids for ids in prefilled if set(ids) != {0}]
    assert len(of_documents) == len(set(of_documents)) == 2
    # A run that was stopped measures what is missing, and the rows are the same.
    lines = (tmp_path / SAMPLES).read_text().splitlines(keepends=True)
    rows = [row.score for row in outcome.rows]
    (tmp_path / SAMPLES).write_text("".join(lines[:7]))
    again, _ = go(tiny_folder, tmp_path, question="after", samples=2)
    assert again.measured == 11
    assert [row.score for row in again.rows] == rows


def test_what_was_measured_with_the_question_inside_stays_so() -> None:
    for name in preset_names():
        config, _ = resolve({}, name)
        later = name.startswith(("exam", "evidence")) or name in ("demo", "rereading")
        if set(config.tasks) != {"fidelity"} and not later:
            assert config.question == "before", name


def test_a_group_is_asked_after_as_a_whole() -> None:
    group = behind(LongBench(["trec", "lcc"]))
    assert isinstance(group, AskedAfterGroup)
    assert group.name == "longbench (question after)"
    assert [task.name for task in group.tasks()] == [
        "longbench:trec (question after)",
        "longbench:lcc (question after)",
    ]
    assert all(isinstance(task, AskedAfter) for task in group.tasks())
    seen: dict[str, Any] = {}

    class Watching(LongBench):
        def evaluate(self, members: Any, counts: Any) -> Evaluation:
            seen.update(members=members, counts=counts)
            return Evaluation(values={})

    watched = behind(Watching(["trec"]))
    assert isinstance(watched, AskedAfterGroup)
    (task,) = watched.tasks()
    watched.evaluate({task.name: Evaluation(values={})}, {task.name: 3})
    assert list(seen["members"]) == list(seen["counts"]) == ["longbench:trec"]


def test_rows_of_older_files_have_no_such_column() -> None:
    older = {"model": "m", "task": "needle", "metric": "x", "method": "full", "n": 1, "score": 1.0, "cell": "full"}
    assert Row(**older, higher_is_better=True).question is None


def test_a_chat_is_measured_and_kept_by_turn(tiny_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tasks": ("turns",), "lengths": (300,), "samples": 5, "question": "after"}
    outcome, _ = go(tiny_folder, tmp_path, **settings)
    assert outcome.failures == []
    metrics = ["exact_match", *(f"exact_match,turn {turn}" for turn in range(1, 5))]
    assert [row.metric for row in outcome.rows if row.method == "mix"] == metrics
    assert {row.task for row in outcome.rows} == {"turns (question after)"}
    for line in read_lines(tmp_path / SAMPLES):
        assert line["text"] == "\n".join(line["turns"])
        assert len(line["turns"]) == line["answers"] == len(line["reference"]) == 4
        assert line["tokens_original"] + line["tokens_quantized"] <= (64 if line["method"] != "full" else 512)
    # What was stopped goes on from answers that are read from the file.
    lines = (tmp_path / SAMPLES).read_text().splitlines(keepends=True)
    (tmp_path / SAMPLES).write_text("".join(lines[:8]))
    again, _ = go(tiny_folder, tmp_path, **settings)
    assert again.measured == 7
    assert [row.score for row in again.rows] == [row.score for row in outcome.rows]
