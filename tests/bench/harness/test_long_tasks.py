"""lm-eval's own tasks of long contexts, with local rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.harness.task import HarnessTask
from tasks.base import Generate, LogLikelihood, TaskSettings
from tasks.errors import TaskError

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "infinitebench_passkey": (
        "passkey",
        {"id": 0, "context": "The pass key is 123.", "input": "What is it?", "answer": ["123"], "options": []},
    ),
    "longbench2_academic_single": (
        "train",
        {"context": "A text.", "question": "What?", "choices": ["a", "b", "c", "d"], "answer": 1},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_they_need_rows_and_nothing_else(tiny: Any, tmp_path: Path, name: str) -> None:
    split, row = ROWS[name]
    settings = TaskSettings(tokenizer=tiny.tokenizer, max_length=512, data_dir=tmp_path, question="after")
    with pytest.raises(TaskError, match=name) as error:
        HarnessTask(name).load(settings)
    assert error.value.reason == f"no rows in --data-dir {tmp_path}"
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{split}.jsonl").write_text(json.dumps(row))
    (document,) = HarnessTask(name).load(settings)
    request = document.request
    if isinstance(request, Generate):
        assert request.question_ids, "the context is compressed without its question"
    else:
        assert isinstance(request, LogLikelihood)
        assert len(request.continuations) == 4
        assert all(item.question_ids for item in request.continuations)
