"""Sampled answers: seeded, the same for all methods, several to a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.engine.engine import Engine
from bench.errors import UserError
from bench.gate.comparing import check
from bench.gate.findings import Tolerances
from bench.gate.reading import read
from bench.judge.stats import mean_interval
from bench.names import SAMPLES
from bench.records.row import read_results
from bench.runs.asked import make_task
from bench.runs.documents import evaluation_of, prompt_hash
from bench.runs.repeats import repeated
from bench.settings.run import RunConfig
from tasks.base import Document, Evaluation, Generate, Generated, Rolling, Task, TaskError
from tests.bench.conftest import read_lines
from tests.bench.lines import recorded
from tests.bench.runs.test_run import go

SAMPLED: dict[str, Any] = {
    "samples": 5,
    "lengths": (200,),
    "cache_size": (48,),
    "temperature": 2.0,
    "repeats": 3,
    "question": "after",
    "quant_type": ("full", "window"),
}


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repeats") / "done"
    go(tiny_folder, path, **SAMPLED)
    return path


def answers(path: Path) -> dict[tuple[str, str, int | None], str]:
    return {(x["document"], x["cell"], x.get("repeat")): x["text"] for x in read_lines(path / SAMPLES)}


def test_every_document_has_as_many_answers_from_one_prefill(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    prefill = Engine.prefill
    monkeypatch.setattr(
        Engine,
        "prefill",
        lambda self, prompts: read.append(len(prompts)) or prefill(self, prompts),  # type: ignore[func-returns-value]
    )
    for question in ("after", "before"):
        read.clear()
        path = tmp_path / question
        go(tiny_folder, path, **{**SAMPLED, "limit": 2, "question": question})
        lines = read_lines(path / SAMPLES)
        assert len(lines) == 2 * 3 * 2
        assert len({(line["cell"], line["text"]) for line in lines}) > 6, "a hot model repeats itself"
        # A warm-up, then a prompt for each document.
        assert sum(read) == 1 + 2


def test_of_several_lengths_each_has_its_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """Those of a length are of its documents only, pass@k too."""
    settings = {**SAMPLED, "lengths": (400, 480), "samples": 1, "repeats": 2}
    outcome, _ = go(tiny_folder, tmp_path, tasks=("ruler:niah_single_1",), **settings)
    assert outcome.failures == []
    documents = {"string_match": 2, "string_match,400": 1, "string_match,480": 1}
    documents |= {f"{metric} pass@2": n for metric, n in documents.items()}
    for method in ("full", "window"):
        assert {row.metric: row.n for row in outcome.rows if row.method == method} == documents


def test_rows_are_means_over_repeats_with_intervals_over_documents(done: Path) -> None:
    rows = {(row.metric, row.method): row for row in read_results(done)}
    lines = [line for line in read_lines(done / SAMPLES) if line["method"] == "full"]
    assert {line["repeat"] for line in lines} == {1, 2, 3}
    row = rows["exact_match", "full"]
    assert (row.n, row.repeats, row.sources) == (5, 3, 5)
    assert row.score == pytest.approx(sum(line["score"] for line in lines) / 15)
    sources = [line["info"]["source"] for line in lines]
    expected = mean_interval([line["score"] for line in lines], binary=True, bounds=(0, 1), sources=sources)
    assert expected is not None
    assert (row.score_low, row.score_high) == pytest.approx(tuple(expected))
    best: dict[str, float] = {}
    for line in lines:
        name = line["document"].partition("~")[0]
        best[name] = max(best.get(name, 0.0), line["score"])
    passed = rows["exact_match pass@3", "full"]
    assert (passed.n, passed.score) == (5, pytest.approx(sum(best.values()) / 5))


def test_continued_it_is_the_same_and_grows_by_repeats(tiny_folder: Path, done: Path, tmp_path: Path) -> None:
    path = tmp_path / "grown"
    go(tiny_folder, path, **{**SAMPLED, "repeats": 1, "limit": 2})
    (path / SAMPLES).write_text("".join((path / SAMPLES).read_text().splitlines(keepends=True)[:3]))
    outcome, _ = go(tiny_folder, path, **SAMPLED, batch_size=4)
    assert outcome.measured == 27
    assert answers(path) == answers(done)
    # Fewer repeats are asked for now: those of earlier stay.
    outcome, said = go(tiny_folder, path, **{**SAMPLED, "repeats": 1})
    assert not outcome.measured
    assert "10 documents of earlier starts stay" in said
    assert {row.repeats for row in outcome.rows} == {3}
    for changed in ({"temperature": 1.0}, {"top_p": 0.5}, {"temperature": None, "repeats": 1}):
        with pytest.raises(UserError, match=r"temperature|top_p"):
            go(tiny_folder, path, **{**SAMPLED, **changed})


def test_greedy_runs_know_nothing_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path, samples=1, lengths=(200,), quant_type=("full",))
    assert {line["repeat"] for line in read_lines(tmp_path / SAMPLES)} == {None}
    assert not {"temperature", "top_p"} & recorded(tmp_path)["fingerprint"].keys()
    assert {row.repeats for row in read_results(tmp_path)} == {None}


def test_what_is_not_generated_is_asked_once(tiny_folder: Path, tmp_path: Path) -> None:
    more = {**SAMPLED, "samples": 1, "continuation": 4}
    outcome, said = go(tiny_folder, tmp_path, tasks=("fidelity",), **more)
    assert "fidelity: --temperature 2: the task generates no answers, and is asked once, as it is" in said
    assert {row.repeats for row in outcome.rows} == {None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"repeats": 3}, "--repeats=3: without sampling all would be equal: give --temperature 0.6 too"),
        ({"top_p": 0.9}, "--top-p=0.9: greedy answers draw nothing: give --temperature 0.6 too"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": 0.6, "top_p": 1.5}, "--top-p"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RunConfig(**given)


def test_seeds_are_of_run_document_and_repeat() -> None:
    task = make_task("needle")
    assert isinstance(task, Task)
    documents = [
        Document(id="a", request=Generate(prompt_ids=(1,), max_new_tokens=2), info={"source": "text"}),
        Document(id="b", request=Generate(prompt_ids=(1,), max_new_tokens=2)),
        Document(id="c", request=Rolling(windows=())),
    ]
    found = repeated(RunConfig(temperature=0.6, repeats=2), task, documents)
    assert [item.id for item in found] == ["a", "a~2", "b", "b~2", "c"]
    assert [item.info.get("source") for item in found] == ["text", "text", "b", "b", None]
    again = repeated(RunConfig(temperature=0.6, repeats=2, seed=1), task, documents)
    assert len({prompt_hash(item) for item in [*found[:4], *again[:4]]}) == 8
    assert repeated(RunConfig(temperature=0.6), task, documents)[0] == found[0], "more repeats change no earlier one"
    taken = [documents[0], Document(id="a~2", request=documents[0].request)]
    with pytest.raises(TaskError, match="'a~2', which is the name of a repeat"):
        repeated(RunConfig(temperature=0.6, repeats=2), task, taken)


def test_a_task_evaluates_each_repeat_as_its_own_documents() -> None:
    class Longest(Task):
        """Scored by its longest answer, whatever the others are."""

        name = "longest"
        metrics = ()

        def load(self, settings: Any) -> list[Document]:
            return []

        def score(self, document: Document, answer: Any) -> dict[str, float]:
            return {}

        def evaluate(self, documents: Any, answers: Any) -> Any:
            assert [item.id for item in documents] == ["a", "b"]
            return Evaluation(values={"longest": max(len(answers[item.id].text) for item in documents)})

    request = Generate(prompt_ids=(1,), max_new_tokens=2)
    documents = repeated(
        RunConfig(temperature=0.6, repeats=2), Longest(), [Document(id=name, request=request) for name in "ab"]
    )
    texts = {"a": "x", "a~2": "xxx", "b": "xx", "b~2": ""}
    found = evaluation_of(Longest(), documents, {name: Generated(text=text) for name, text in texts.items()})
    assert found.values == {"longest": 2.5}


def test_the_gate_counts_no_lost_answers_where_they_are_sampled(done: Path) -> None:
    run, baseline = read(done), read(done)
    # One of three is right in both, another one.
    for side, right in ((baseline, 1), (run, 2)):
        for sample in side.samples.values():
            sample.scores = {"exact_match": float(sample.repeat == right)}
    report = check(run, baseline, Tolerances(judge_speed=False))
    assert not [item for item in report.findings if "right answers" in item.what]
    assert any("answers are sampled" in note for note in report.notes)
    assert {item.outcome for item in report.findings if "exact_match" in item.what} == {"ok"}
