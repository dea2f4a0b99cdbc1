"""LongBench's prompts in parts: the official text to the byte, divided where its context ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.base import Generate, TaskSettings
from tasks.longbench.datasets import DATASETS
from tasks.longbench.prompts import build_prompt, template
from tasks.longbench.task import LongBenchTask
from tests.tasks.longbench.conftest import real_rows
from tests.tasks.longbench.test_prompts import CHAT, characters


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("chat", [None, CHAT])
def test_the_text_is_the_official_one_to_the_byte(shared_data: Path, name: str, chat: str | None) -> None:
    row = real_rows(shared_data, name)[0]
    row["context"] = row["context"][:3_000]
    form = template(name)
    official = form.text.format(context=row["context"], input=row["input"])
    text, boundary = form.fill(row["context"], row["input"])
    assert text == official
    assert text[:boundary].endswith(row["context"])
    # The question is in the second part, and nowhere else.
    assert row["input"] in text[boundary:]
    tokenizer = characters(chat)
    made = TaskSettings(tokenizer=tokenizer, max_length=100_000, context_length=100_000)
    whole = build_prompt(DATASETS[name], text, made, max_new_tokens=10)
    parts = build_prompt(DATASETS[name], text, made, max_new_tokens=10, boundary=boundary)
    assert parts.ids + parts.question_ids == whole.ids
    assert parts.cut_tokens == whole.cut_tokens == 0
    assert tokenizer.decode(parts.ids).endswith(row["context"][-20:])
    end = "<assistant>" if chat and DATASETS[name].uses_chat_template else ""
    assert tokenizer.decode(parts.question_ids) == text[boundary:] + end


def cut(limit: int, *, question: str = "What is it? " * 5, chat: str | None = None) -> tuple[Any, Any, Any]:
    """A prompt of 500 characters and a question, cut to ``limit`` tokens, as a whole and in parts."""
    tokenizer = characters(chat)
    made = TaskSettings(tokenizer=tokenizer, max_length=10_000, context_length=10_000, options={"max_length": limit})
    context = "".join(chr(ord("a") + i % 26) for i in range(500))
    arguments = (DATASETS["qasper"], context + question, made)
    whole = build_prompt(*arguments, max_new_tokens=10)
    return tokenizer, whole, build_prompt(*arguments, max_new_tokens=10, boundary=len(context))


@pytest.mark.parametrize("chat", [None, CHAT])
@pytest.mark.parametrize("limit", [120, 121, 200, 400])
def test_a_cut_leaves_the_question_whole_where_it_has_room(limit: int, chat: str | None) -> None:
    tokenizer, whole, parts = cut(limit, chat=chat)
    assert parts.ids + parts.question_ids == whole.ids
    assert parts.cut_tokens == whole.cut_tokens > 0
    asked = tokenizer.decode(parts.question_ids, skip_special_tokens=True)
    assert asked == ("What is it? " * 5)[-(limit // 2) :]


def test_a_question_longer_than_its_half_is_cut_too() -> None:
    tokenizer, whole, parts = cut(60)
    assert parts.ids + parts.question_ids == whole.ids
    assert tokenizer.decode(parts.question_ids) == ("What is it? " * 5)[-30:]
    assert len(parts.ids) == 30


def test_documents_come_whole_or_in_parts(shared_data: Path) -> None:
    found = {}
    for question in ("before", "after"):
        made = TaskSettings(
            tokenizer=characters(),
            max_length=4_000,
            context_length=4_000,
            data_dir=shared_data / "minilongbench",
            limit=2,
            question=question,  # type: ignore[arg-type]
        )
        found[question] = LongBenchTask(DATASETS["hotpotqa"]).load(made)
    for before, after in zip(found["before"], found["after"], strict=True):
        assert isinstance(before.request, Generate)
        assert isinstance(after.request, Generate)
        assert before.request.question_ids == ()
        assert after.request.input_ids == before.request.prompt_ids
        assert (after.info, after.id, after.truncated) == (before.info, before.id, before.truncated)
        assert characters().decode(after.request.question_ids).startswith("\n\nAnswer the question based on")
