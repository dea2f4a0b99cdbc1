"""Several questions in turn: where the numbers stand, what each turn asks, and the score of each."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.base import Generate, Generated, TaskError, TaskSettings
from tasks.registry import get_task
from tasks.turns import NAMES, TurnsTask
from tests.tasks.test_needle import TEMPLATE, byte_tokenizer


def settings(tokenizer: Any, **changes: Any) -> TaskSettings:
    options = {"lengths": [1500], "samples": 3, **changes.pop("options", {})}
    return TaskSettings(tokenizer=tokenizer, options=options, **{"max_length": 4_000, **changes})


@pytest.mark.parametrize("chat", [None, TEMPLATE])
def test_a_chat_about_one_text(chat: str | None) -> None:
    tokenizer = byte_tokenizer(chat)
    documents = TurnsTask().load(settings(tokenizer, question="after"))
    assert len({document.id for document in documents}) == 3
    for document in documents:
        request = document.request
        assert isinstance(request, Generate)
        context = tokenizer.decode(request.prompt_ids)
        questions = [tokenizer.decode(ids) for ids in (request.question_ids, *request.turns)]
        names = document.info["names"]
        assert sorted(names) == sorted(NAMES)
        places = []
        for name, number, question in zip(names, document.reference, questions, strict=True):
            assert question.count(f"What is the number of {name}?") == 1
            assert question.endswith(f"The number of {name} is")
            fact = f"The number of {name} is {number}."
            assert context.count(fact) == 1
            places.append(context.index(fact) / len(context))
        assert sorted(round(4 * place - 0.5) for place in places) == [0, 1, 2, 3]
        assert 1380 < len(request.input_ids) <= 1500
        assert document.info["prompt_tokens"] == request.prompt_tokens
        if chat:
            # The end of the answer before, and a message of its own.
            assert all(turn.startswith("<|end|><|user|>What") for turn in questions[1:])
            assert all("<|assistant|>" in turn for turn in questions)


def test_before_is_the_same_text_with_the_first_question_in_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    found = [TurnsTask().load(settings(tokenizer, question=place)) for place in ("before", "after")]
    for before, after in zip(*found, strict=True):
        assert before.request.question_ids == ()
        assert before.request.prompt_ids == after.request.input_ids
        assert before.request.turns == after.request.turns
    assert found[0] == TurnsTask().load(settings(tokenizer))
    limited = TurnsTask().load(settings(tokenizer, limit=2))
    assert [item.id for item in limited] == [item.id for item in found[0][:2]]


def test_scores_by_turn() -> None:
    task = get_task("turns")
    assert isinstance(task, TurnsTask)
    document = task.load(settings(byte_tokenizer()))[0]
    texts = [f" {number}." for number in document.reference]
    texts[1], texts[3] = " 1 or so", "nothing"
    scores = task.score(document, Generated(text="\n".join(texts), turns=tuple(texts)))
    assert list(scores.values()) == [0.5, 1.0, 0.0, 1.0, 0.0]
    assert list(scores) == [metric.name for metric in task.metrics]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TaskError, match="100 tokens are too short: the questions alone take"):
        TurnsTask().load(settings(byte_tokenizer(), options={"lengths": [100]}))
    with pytest.raises(TaskError, match="more than the maximum of 1600: choose shorter lengths"):
        TurnsTask().load(settings(byte_tokenizer(), max_length=1_600))
    with pytest.raises(TaskError, match="does not show every message as it is"):
        TurnsTask().load(settings(byte_tokenizer("{{ messages[-1].content }}")))
