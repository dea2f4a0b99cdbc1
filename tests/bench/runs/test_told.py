"""Methods that have to know where in a prompt its question begins: runs tell them, or are refused."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.errors import UserError
from bench.names import SAMPLES
from bench.runs.asked import asked_for, documents_of, models_of, plugins_of, task_settings, tasks_of
from bench.runs.documents import prompt_hash
from bench.runs.told import with_questions
from bench.settings.run import RunConfig
from tasks import needle
from tasks.base import Continuation, Document, Generate, LogLikelihood, TaskError
from tests.bench.conftest import define_toys, read_lines
from tests.bench.runs.test_run import go

if find_spec("kvpress") is None:
    pytest.skip("kvpress is not installed", allow_module_level=True)

FINCH = "kvpress:finch"


def test_a_run_tells_where_questions_begin(tiny_folder: Path, tmp_path: Path) -> None:
    """Generated answers and choices; more questions come behind the answers to the first ones."""
    tasks, data = define_toys(tmp_path / "toys")
    names = ("needle", "turns", "chain", "toy_east")
    settings: dict[str, Any] = {"tasks": names, "include_path": (str(tasks),), "data_dir": data, "num_fewshot": 2}
    outcome, _ = go(
        *(tiny_folder, tmp_path / "run"),
        **{**settings, "quant_type": ("full", FINCH), "lengths": (300,), "samples": 1, "limit": 1, "chain_steps": 6},
    )
    assert outcome.failures == []
    assert outcome.measured == 2 * len(names)
    lines = [line for line in read_lines(tmp_path / "run" / SAMPLES) if line["method"] == FINCH]
    assert {line["question"] for line in lines} <= {"before", "inside"}
    for line in lines:
        if line["prompt_tokens"] > 70:
            assert line["tokens_evicted"] > 0, line["task"]


def test_what_is_told_changes_no_prompt(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of other methods stay where they are."""
    settings: dict[str, Any] = {"tasks": ("needle", "turns"), "lengths": (300,), "samples": 1, "question": "before"}
    config = RunConfig(model=(str(tiny_folder),), methods=(FINCH,), device="cpu", **settings)
    cells, asked, _ = asked_for(config, *plugins_of(config))
    (model,) = models_of(config, (), Console(quiet=True))[0].values()
    for task, _ in tasks_of(asked):
        plain, told = (documents_of(config, model, task, mine)[0] for mine in ([], cells))
        divided = task.load(replace(task_settings(config, model, task), question="after"))[0].request
        assert isinstance(plain.request, Generate)
        assert isinstance(told.request, Generate)
        assert isinstance(divided, Generate)
        assert (plain.request.question_tokens, told.request.question_tokens) == (0, len(divided.question_ids))
        assert replace(told.request, question_tokens=0) == plain.request
        assert prompt_hash(told) == prompt_hash(plain)

    def fails(*_: Any) -> Any:
        raise TaskError("the chat template changes the text between context and question")

    monkeypatch.setattr(needle._Frame, "parts", fails)
    task = tasks_of(asked)[0][0]
    assert len(documents_of(config, model, task, [])) == 1
    with pytest.raises(TaskError, match="needle: where its questions begin cannot be told, which kvpress:finch has to"):
        documents_of(config, model, task, cells)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"question": "after"}, "needle is to ask behind its contexts: give --question before"),
        ({"question": "both"}, "needle is to ask behind its contexts: give --question before"),
        ({"tasks": ("needle", "fidelity")}, "fidelity tells no question from its context: leave one of the two out"),
    ],
)
def test_other_runs_are_refused(tiny_folder: Path, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        go(tiny_folder, tmp_path / "run", quant_type=("full", FINCH), **given)
    assert str(caught.value).startswith(FINCH)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_other_tokens_behind_a_context_tell_nothing() -> None:
    whole = Document(id="d", request=Generate(prompt_ids=(1, 2, 3), max_new_tokens=1))
    other = replace(whole, request=Generate(prompt_ids=(1, 2), question_ids=(4,), max_new_tokens=1))
    with pytest.raises(TaskError, match="document 'd' has other tokens where its question stands behind the context"):
        with_questions([whole], [other])
    with pytest.raises(TaskError, match="document 'd' has other tokens"):
        with_questions([whole], [])


def test_choices_are_told_each() -> None:
    def choices(*parts: tuple[tuple[int, ...], tuple[int, ...]]) -> Document:
        items = [Continuation(context_ids=context, question_ids=asked, token_ids=(9,)) for context, asked in parts]
        return Document(id="d", request=LogLikelihood(continuations=tuple(items)))

    whole, parted = choices(((1, 2, 3), ()), ((1, 2), ())), choices(((1,), (2, 3)), ((1, 2), ()))
    (told,) = with_questions([whole], [parted])
    assert isinstance(told.request, LogLikelihood)
    assert [item.question_tokens for item in told.request.continuations] == [2, 0]
    assert prompt_hash(told) == prompt_hash(whole)
    with pytest.raises(TaskError, match="other tokens"):
        with_questions([whole], [choices(((1,), (2, 4)), ((1, 2), ()))])
