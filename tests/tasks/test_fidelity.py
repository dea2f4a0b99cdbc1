"""Prompts from a text, evenly spread, and what is made of the numbers of every token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.base import Compare, Compared, Document, TaskError, TaskSettings
from tasks.fidelity import FidelityTask
from tasks.registry import get_task


class Letters(SimpleNamespace):
    """A token a character."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(100 + i % 1000) for i in range(1000)))
    return path


def load(options: dict[str, Any], bos: int | None = None, **more: Any) -> list[Document]:
    settings = TaskSettings(tokenizer=Letters(bos_token_id=bos), options=options, **{"max_length": 4096, **more})
    return FidelityTask().load(settings)


def test_prompts_are_spread_evenly(text: Path) -> None:
    documents = load({"text": text, "lengths": [50, 100], "samples": 4, "continuation": 10})
    assert [d.id for d in documents] == [f"fidelity-{length}-{i}" for length in (50, 100) for i in range(4)]
    for document in documents:
        request = document.request
        assert isinstance(request, Compare)
        assert (len(request.context_ids), len(request.continuation_ids)) == (document.info["length"], 10)
        tokens = request.context_ids + request.continuation_ids
        assert tokens == tuple(range(100 + document.info["start"], 100 + document.info["start"] + len(tokens)))
    for i, document in enumerate(documents[:4]):
        assert i / 4 * 941 - 1 <= document.info["start"] < (i + 1) / 4 * 941
    assert documents == load({"text": text, "lengths": [50, 100], "samples": 4, "continuation": 10})
    assert documents != load({"text": text, "lengths": [50, 100], "samples": 4, "continuation": 10}, seed=1)


def test_prompts_that_overlap_are_of_one_source(text: Path) -> None:
    """And no others: also where the overlap is of a prompt's continuation, or with a prompt of another length."""
    documents = load({"text": text, "lengths": [50, 150], "samples": 6, "continuation": 10})
    reach = {}
    for document in documents:
        assert isinstance(document.request, Compare)
        tokens = len(document.request.context_ids) + len(document.request.continuation_ids)
        reach[document.id] = set(range(document.info["start"], document.info["start"] + tokens))
    shared = {(a.id, b.id) for a in documents for b in documents if reach[a.id] & reach[b.id]}
    while more := {(a, d) for a, b in shared for c, d in shared if b == c} - shared:
        shared |= more
    same = {(a.id, b.id) for a in documents for b in documents if a.info["source"] == b.info["source"]}
    assert same == shared
    assert 1 < len({document.info["source"] for document in documents}) < len(documents)


def test_a_limit_counts_all_lengths_together(text: Path) -> None:
    options = {"text": text, "lengths": [50, 100], "samples": 4}
    everything = {document.id: document for document in load(options)}
    few = load(options, limit=2)
    assert [document.id for document in few] == ["fidelity-50-0", "fidelity-100-0"]
    assert all(everything[document.id] == document for document in few)
    assert len(load(options, sampling_ratio=0.5)) == 4


def test_a_prompt_begins_as_the_model_knows_it(text: Path) -> None:
    (document,) = load({"text": text, "lengths": 50, "samples": 1}, bos=7)
    assert document.request.context_ids[0] == 7
    assert len(document.request.context_ids) == 50


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"body": "abc" * 20}) for _ in range(2)))
    (document,) = load({"text": path, "text_field": "body", "lengths": 40, "samples": 1, "continuation": 4})
    assert set(document.request.context_ids) <= {*map(ord, "abc\n")}
    with pytest.raises(TaskError, match=r"text\.jsonl, line 1: no text in a field 'text'"):
        load({"text": path, "lengths": 40})
    path.write_text("{")
    with pytest.raises(TaskError, match=r"text\.jsonl, line 1: not JSON"):
        load({"text": path})


@pytest.mark.parametrize("name", ["text.json", "TEXT.JSON", "text.ndjson"])
def test_a_file_with_another_ending_of_json(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"text": "abc\u2028" * 20}, {"text": "abc\u0085" * 20}]
    lines = name.endswith("ndjson")
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if lines else json.dumps(rows))
    (document,) = load({"text": path, "lengths": 40, "samples": 1, "continuation": 4})
    assert set(document.request.context_ids) <= {*map(ord, "abc\n\u2028\u0085")}
    path.write_text("[1]" if not lines else '{"other": 1}')
    with pytest.raises(TaskError, match=r"(item|line) 1: no text in a field 'text'"):
        load({"text": path})
    path.write_text("Plain words.")
    with pytest.raises(TaskError, match="not JSON"):
        load({"text": path})


def test_the_default_text_comes_with_python() -> None:
    task = get_task("fidelity")
    assert isinstance(task, FidelityTask)
    documents = task.load(TaskSettings(tokenizer=Letters(), max_length=4096))
    assert len(documents) == 8
    assert len(task.data_hash()) == 64


def test_made_sentences_are_the_same_everywhere() -> None:
    """A baseline of one version of Python is compared with runs of others."""
    task = FidelityTask()
    documents = task.load(TaskSettings(tokenizer=Letters(), max_length=4096, options={"text": "sentences"}))
    assert len(documents) == 8
    assert task.data_hash() == "52e38d12f8bd68815ed320d41d7aeaf73f1af43cf4675936ea840424d75f1349"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": 990}, "has 1000 tokens, fewer than the 1054 of a prompt"),
        ({"lengths": 4090}, "prompts of 4090 tokens and 64 more do not fit 4096"),
        ({"lengths": [1]}, "lengths must be whole numbers of at least 2"),
        ({"lengths": [50, 50]}, "names one length twice"),
        ({"sample": 3}, "no option 'sample': did you mean samples"),
        ({"text": "nowhere.txt"}, "cannot read the text nowhere.txt: No such file"),
    ],
)
def test_bad_options(text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load({"text": text, **options})


def test_percentiles_are_over_the_tokens_of_all_prompts(text: Path) -> None:
    task = FidelityTask()
    documents = task.load(TaskSettings(tokenizer=Letters(), max_length=4096, options={"text": text, "lengths": 50}))[:2]
    answers = {
        document.id: Compared(
            kl=tuple(float(10 * i + j) for j in range(1, 11)),
            agrees=(True,) * 5 + (False,) * 5,
            delta_nll=(-1.0,) * 10,
        )
        for i, document in enumerate(documents)
    }
    assert task.score(documents[0], answers[documents[0].id])["kl_p95"] == 10
    values = task.evaluate(documents, answers).values
    assert values == {"kl": 10.5, "kl_p95": 19, "top1_agreement": 0.5, "delta_nll": -1}
    assert task.evaluate(documents[:1], answers).values["kl"] == 5.5
    assert task.evaluate(documents, {}).values == {}


def test_layers_are_a_metric_where_they_are_asked_for(text: Path) -> None:
    options = {"text": text, "lengths": 50, "per_layer": True}
    task = FidelityTask()
    document, *_ = task.load(TaskSettings(tokenizer=Letters(), max_length=4096, options=options))
    assert document.request.per_layer
    answer = Compared(kl=(1.0,), agrees=(True,), delta_nll=(0.0,), attention_error=(0.25, 0.5))
    assert task.score(document, answer)["attention_error"] == 0.375
    assert task.evaluate([document], {document.id: answer}).values["attention_error"] == 0.375
    assert task.metrics[-1].name == "attention_error"
    assert "attention_error" not in {metric.name for metric in FidelityTask.metrics}
