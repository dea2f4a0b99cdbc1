"""What a task gives is checked once; a faulty one is a line with file and line number, and the others go on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import errors
from bench.cli import main
from bench.names import QUESTION_AFTER, SAMPLES
from bench.runs.documents import evaluation_of, load_documents, scores_of
from bench.runs.failures import failure_lines
from bench.runs.run import Outcome, execute
from bench.settings.run import RunConfig
from tasks.base import (
    Compare,
    Document,
    Evaluation,
    Generate,
    Generated,
    LogLikelihood,
    Metric,
    Task,
    TaskError,
    TaskSettings,
)
from tests.bench.conftest import read_lines
from tests.bench.lines import recorded

SETTINGS = TaskSettings(tokenizer=None, max_length=100)
PROMPT = Generate(prompt_ids=(1, 2, 3), max_new_tokens=2)


class Given(Task):
    """Gives what it was given."""

    name = "given"
    metrics = (Metric(name="score"), Metric(name="other"))

    def __init__(self, documents: list[Any], score: Any = None) -> None:
        self.documents, self.given = documents, score

    def load(self, settings: TaskSettings) -> list[Any]:
        return self.documents

    def score(self, document: Document, answer: Any) -> Any:
        return self.given


def asked(request: Any, **more: Any) -> list[Document]:
    return [Document(id="a", request=request, **more)]


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([], "given: has no documents"),
        (asked(PROMPT) * 2, "two documents have the id 'a'"),
        (["a"], "gives str where a Document is asked for"),
        ([Document(id=3, request=PROMPT)], "id is a text, not 3"),  # type: ignore[arg-type]
        (asked("what?"), "document 'a' asks for str, which is no request"),
        (asked(Generate(prompt_ids=(), max_new_tokens=2)), "has an empty prompt"),
        (asked(Generate(prompt_ids=(1, 50), max_new_tokens=2)), "the token 50 in its prompt; the model knows 0 to 49"),
        (asked(Generate(prompt_ids=(-1, 4), max_new_tokens=2)), "the token -1 in its prompt"),
        (asked(Generate(prompt_ids=(1, 2.5), max_new_tokens=2)), "has 2.5 in its prompt, which is no whole"),  # type: ignore[arg-type]
        (asked(Generate(prompt_ids=(1,), max_new_tokens=0)), "asks for 0 new tokens"),
        (asked(Compare(context_ids=(1, 2), continuation_ids=())), "has an empty continuation"),
        (asked(LogLikelihood(continuations=())), "has an empty list of continuations"),
        (asked(PROMPT, info={"x": {1, 2}}), "has no JSON as its info: Object of type set"),
        (asked(PROMPT, reference=float("nan")), "has no JSON as its reference"),
    ],
)
def test_documents_that_cannot_be_answered(documents: list[Any], said: str) -> None:
    with pytest.raises(TaskError) as raised:
        load_documents(Given(documents), SETTINGS, 50)
    assert said in str(raised.value)
    line = Given.load.__code__.co_firstlineno
    assert str(raised.value).endswith(f"(test_documents.py, line {line})")


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ({"score": 1.0}, "its score of 'a' lacks the metric 'other'"),
        ({"score": "good", "other": 1.0}, "has 'good' as 'score', which is no number"),
        (0.5, "is 0.5, no mapping of metrics to numbers"),
    ],
)
def test_scores_that_are_none(score: Any, said: str) -> None:
    with pytest.raises(TaskError, match=rf"given: .*{said}.* \(test_documents.py, line \d+\)"):
        scores_of(Given([], score), asked(PROMPT)[0], Generated(text=""))


def test_a_rule_of_its_own_needs_the_headline_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Given, "evaluate", lambda *_: Evaluation(values={"score": "much"}))  # type: ignore[dict-item]
    task = Given([], {"score": 1})
    assert scores_of(task, asked(PROMPT)[0], Generated(text="")) == {"score": 1.0}
    with pytest.raises(TaskError, match="its evaluation has 'much' as 'score'"):
        evaluation_of(task, [], {})


PLUGIN = """
from tasks.base import Document, Generate, Metric, Task


class Base(Task):
    metrics = (Metric(name="score", low=0.0, high=1.0),)

    def load(self, settings):
        return [Document(id="a", request=Generate(prompt_ids=(1, 2, 3) * 40, max_new_tokens=2))]

    def score(self, document, answer):
        return {"score": 1.0}


class Twins(Base):
    name = "twins"

    def load(self, settings):  # twins
        return super().load(settings) * 2


class Beyond(Base):
    name = "beyond"

    def load(self, settings):  # beyond
        return [Document(id="a", request=Generate(prompt_ids=(10**6,) * 40, max_new_tokens=2))]


class Wrong(Base):
    name = "wrong"

    def score(self, document, answer):  # wrong
        return {"other": 1.0}


class Raising(Base):
    name = "raising"

    def load(self, settings):
        return [len(document) for document in super().load(settings)]  # raising


class Good(Base):
    name = "good"
"""
FAULTY = ("twins", "beyond", "wrong", "raising")


def go(folder: Path, path: Path, plugin: Path, **settings: Any) -> tuple[Outcome, str]:
    given: dict[str, Any] = {
        "model": (str(folder),),
        "plugin": (str(plugin),),
        "tasks": (*FAULTY, "good"),
        "quant_type": ("full", "mix"),
        "cache_size": (64,),
        "window_size": (8,),
        "device": "cpu",
        "dtype": "float32",
        "question": "before",
    }
    console = Console(file=io.StringIO(), width=200)
    return execute(RunConfig(**{**given, **settings}), path, console), console.file.getvalue()  # type: ignore[attr-defined]


def test_a_faulty_task_leaves_the_others_alone(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "faulty.py"
    plugin.write_text(PLUGIN)
    outcome, _ = go(tiny_folder, tmp_path / "run", plugin)
    assert {row.task for row in outcome.rows} == {"good"}
    said = {failure["task"]: failure["error"] for failure in outcome.failures}
    assert set(said) == set(FAULTY)
    for task, error in said.items():
        line = next(number for number, text in enumerate(PLUGIN.split("\n"), 1) if text.endswith(f"# {task}"))
        assert error.endswith(f"(faulty.py, line {line})")
        assert "\n" not in error
    assert "TypeError: object of type 'Document' has no len()" in said["raising"]
    assert recorded(tmp_path / "run")["failures"] == outcome.failures
    assert {line["task"] for line in read_lines(tmp_path / "run" / SAMPLES)} == {"good"}
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(errors, "SHOW_TRACEBACK", True)
    go(tiny_folder, tmp_path / "run", plugin)
    shown = capsys.readouterr().err
    assert shown.count("has no len()") >= 1
    assert f'File "{plugin}", line' in shown


def test_a_task_with_the_name_of_one_of_lm_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN.replace('"twins"', '"gsm8k"'))
    with pytest.raises(SystemExit) as ended:
        main(["list", "tasks", "--plugin", str(plugin)])
    assert ended.value.code == 1
    assert "plugin mine.py: its task 'gsm8k' has the name of one of lm-eval" in capsys.readouterr().err


def test_tasks_that_fail_for_one_reason_share_a_line(tiny_folder: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "faulty.py"
    plugin.write_text(PLUGIN)
    nowhere = tmp_path / "nowhere"
    tasks = ("longbench", "gsm8k", "good")
    outcome, said = go(tiny_folder, tmp_path / "run", plugin, tasks=tasks, data_dir=nowhere, quant_type=("full",))
    assert len(outcome.failures) == 22
    (line,) = failure_lines(outcome.failures)
    assert line.startswith(f"22 tasks of tiny: no rows in --data-dir {nowhere}: longbench:narrativeqa, ")
    assert line.endswith("gsm8k (each in record.json)")
    assert said.count(f": no rows in --data-dir {nowhere}\n") == 1
    assert "looked for" in recorded(tmp_path / "run")["failures"][0]["error"]


def test_failures_of_cells_stay_apart() -> None:
    missing = {"model": "m", "error": "long", "reason": "no rows"}
    cell = {"model": "m", "task": "c", "cell": "mix", "document": "1", "error": "why"}
    found = [{"task": "a", **missing}, {"plugin": "p", "error": "no"}, cell, {"task": "b", **missing}, cell]
    assert failure_lines(found) == [
        "plugin p: no",
        "2 tasks of m: no rows: a, b (each in record.json)",
        "c (m), mix, 1 and 1 more documents: why",
    ]
    assert failure_lines(found[:1]) == ["a (m): long"]
    assert failure_lines([{**found[0], "error": "a: long"}, {**cell, "error": "c: why"}]) == [
        "a (m): long",
        "c (m), mix, 1: why",
    ]
    after = {"task": f"a{QUESTION_AFTER}", "error": "a: long"}
    assert failure_lines([after]) == ["a (question after): long"]
    others = [found[0], {"task": "a", **missing, "model": "other"}]
    assert failure_lines(others) == ["2 tasks: no rows: a (m), a (other) (each in record.json)"]
