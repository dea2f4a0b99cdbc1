"""LongBench as tasks: documents, scores in percent, buckets, groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.base import Document, Generate, Generated, TaskError, TaskSettings
from tasks.longbench.averages import averages
from tasks.longbench.datasets import DATASETS, EXTENDED, bucket
from tasks.longbench.task import LongBench, LongBenchE, LongBenchTask, mean_scores
from tests.tasks.longbench.test_prompts import characters


def settings(data_dir: Path, **changes: Any) -> TaskSettings:
    return TaskSettings(
        **{"tokenizer": characters(), "max_length": 4_000, "context_length": 4_000, "data_dir": data_dir, **changes}
    )


def write(folder: Path, name: str, rows: int, **changes: Any) -> None:
    content = {"context": "Once.", "input": "Who?", "answers": ["Ann"], "length": 10, "all_classes": None}
    lines = [json.dumps({**content, "input": f"Who {index}?", **changes}) for index in range(rows)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def documents(lengths: list[int]) -> list[Document]:
    request = Generate(prompt_ids=(1,), max_new_tokens=1)
    return [
        Document(id=str(index), request=request, reference=["Ann"], info={"length": length, "all_classes": None})
        for index, length in enumerate(lengths)
    ]


def test_documents(tmp_path: Path) -> None:
    write(tmp_path, "qasper", 5)
    task = LongBenchTask(DATASETS["qasper"])
    loaded = task.load(settings(tmp_path, limit=2))
    assert [document.id for document in loaded] == ["qasper-0", "qasper-1"]
    first = loaded[0]
    prompt = characters().decode(first.request.prompt_ids)
    assert prompt.startswith("<bos>You are given a scientific article")
    assert "Once." in prompt
    assert "Question: Who 0?" in prompt
    assert (first.request.max_new_tokens, first.request.stop) == (128, ())
    assert (first.reference, first.truncated, first.info["length"]) == (["Ann"], False, 10)
    assert len(task.data_hash()) == 64
    drawn = task.load(settings(tmp_path, sampling_ratio=0.4, seed=1))
    assert {document.id for document in drawn} < {f"qasper-{row}" for row in range(5)}
    assert len(drawn) == 2


def test_documents_that_would_be_cut_can_be_left_out(tmp_path: Path) -> None:
    rows = [
        {"context": "x" * (5_000 if index % 2 else 5), "input": "?", "answers": ["a"], "length": 1, "all_classes": None}
        for index in range(6)
    ]
    (tmp_path / "qasper.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = LongBenchTask(DATASETS["qasper"])
    options = {"max_length": 1_500, "skip_cut": True}
    loaded = task.load(settings(tmp_path, options=options, limit=2))
    assert [document.id for document in loaded] == ["qasper-0", "qasper-2"]
    assert len(task.load(settings(tmp_path, options={**options, "skip_cut": False}))) == 6
    with pytest.raises(TaskError, match="--skip-cut leaves none of 6 documents"):
        task.load(settings(tmp_path, options={**options, "max_length": 100}))


def test_a_long_document_is_cut_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, "qasper", 1, context="x" * 5_000)
    (document,) = LongBenchTask(DATASETS["qasper"]).load(settings(tmp_path, options={"max_length": 1_000}))
    assert document.truncated
    assert len(document.request.prompt_ids) == document.info["prompt_tokens"] == 1_000
    assert document.info["cut_tokens"] > 4_000


def test_samsum_ends_at_a_newline(tmp_path: Path) -> None:
    write(tmp_path, "samsum", 1)
    write(tmp_path, "triviaqa", 1)
    (samsum,) = LongBenchTask(DATASETS["samsum"]).load(settings(tmp_path))
    (triviaqa,) = LongBenchTask(DATASETS["triviaqa"]).load(settings(tmp_path))
    assert [characters().decode([token]) for token in samsum.request.end_ids] == ["\n"]
    assert (triviaqa.request.end_ids, samsum.request.stop) == ((), ())


def test_scores_are_percent_and_count_empty_answers() -> None:
    task = LongBenchTask(DATASETS["qasper"])
    asked = documents([1, 1, 1])
    answers = {"0": Generated(text="Ann"), "1": Generated(text=""), "2": Generated(text="Ann Lee")}
    assert task.score(asked[0], answers["0"]) == {"qa_f1": 100.0}
    assert task.evaluate(asked, answers).values == {"qa_f1": pytest.approx(100 * (1 + 0 + 2 / 3) / 3)}
    assert task.evaluate(asked, {"1": answers["1"]}).values == {"qa_f1": 0.0}
    assert task.evaluate(asked, {}).values == {}


def test_longbench_e_scores_by_length() -> None:
    task = LongBenchTask(DATASETS["qasper"], extended=True)
    assert task.name == "longbench-e:qasper"
    asked = documents([3_999, 4_000, 7_999, 20_000])
    answers = {str(i): Generated(text=text) for i, text in enumerate(["Ann", "Ann", "no", "no"])}
    assert task.score(asked[1], answers["1"]) == {"qa_f1": 100.0, "qa_f1,4-8k": 100.0}
    values = task.evaluate(asked, answers).values
    assert values == {"qa_f1": 50.0, "qa_f1,0-4k": 100.0, "qa_f1,4-8k": 50.0, "qa_f1,8k+": 0.0}
    assert set(values) == {metric.name for metric in task.metrics}
    assert "qa_f1,8k+" not in task.evaluate(asked[:3], answers).values, "no rows, no score"


def test_buckets() -> None:
    assert [bucket(length) for length in (0, 3_999, 4_000, 7_999, 8_000)] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+"]
    assert mean_scores([], [1]) == {}


def test_a_prediction_line_has_the_official_form() -> None:
    (document,) = documents([7])
    assert LongBenchTask(DATASETS["qasper"]).prediction(document, Generated(text="Ann\n")) == {
        "pred": "Ann\n",
        "answers": ["Ann"],
        "all_classes": None,
        "length": 7,
    }


def test_groups() -> None:
    assert [task.name for task in LongBench().tasks()] == [f"longbench:{name}" for name in DATASETS]
    assert [task.name for task in LongBenchE().tasks()] == [f"longbench-e:{name}" for name in EXTENDED]
    assert (len(DATASETS), len(EXTENDED)) == (21, 13)
    assert [task.name for task in LongBench(("lcc", "trec", "lcc")).tasks()] == ["longbench:lcc", "longbench:trec"]
    with pytest.raises(TaskError, match="longbench has no dataset 'trek': did you mean trec") as caught:
        LongBench(("trek",))
    assert caught.value.usage
    with pytest.raises(TaskError, match="longbench-e has no dataset 'vcsum'"):
        LongBenchE(("vcsum",))


def test_averages() -> None:
    found = {mean.kind: mean for mean in averages({"trec": 60.0, "lsht": 20.0, "lcc": 10.0})}
    assert list(found) == ["Few-shot", "Code", "English", "Chinese", "All"]
    assert (found["Few-shot"].score, found["Few-shot"].datasets, found["Few-shot"].of) == (40.0, 2, 4)
    assert (found["English"].of, found["Chinese"].of, found["Code"].of, found["All"].of) == (14, 5, 2, 21)
    assert found["All"].score == 30.0
    extended = {mean.kind: mean.of for mean in averages({"trec": 60.0, "lcc": 1.0}, EXTENDED)}
    assert extended == {"Few-shot": 3, "Code": 2, "English": 11, "All": 13}
    assert averages({}) == []
