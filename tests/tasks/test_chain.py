"""A long answer that can be checked: the steps, what the answer to them is, and what a wrong one scores."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tasks.base import Document, Generate, Generated, TaskError, TaskSettings
from tasks.chain import VARIABLES, ChainTask
from tasks.registry import get_task
from tests.tasks.test_needle import TEMPLATE, byte_tokenizer


def settings(tokenizer: Any, **changes: Any) -> TaskSettings:
    options = {"chain_steps": 30, "samples": 3, **changes.pop("options", {})}
    return TaskSettings(tokenizer=tokenizer, options=options, **{"max_length": 8_000, **changes})


def read(text: str) -> list[list[Any]]:
    """The steps of a prompt."""
    found = re.findall(r"Step (\d+): (\w) ([+-])= (\d)\n", text)
    assert [int(number) for number, *_ in found] == list(range(1, len(found) + 1))
    return [[name, int(sign + change)] for _, name, sign, change in found]


def answer(steps: list[list[Any]]) -> list[str]:
    """The lines of a right answer, counted anew."""
    values = dict.fromkeys(VARIABLES, 0)
    lines = []
    for number, (name, change) in enumerate(steps, start=1):
        values[name] += change
        assert 0 <= values[name] <= 30
        lines.append(f"Step {number}: {name} {'+' if change > 0 else '-'}= {abs(change)} -> {name} = {values[name]}")
    return lines


@pytest.mark.parametrize("chat", [None, TEMPLATE])
@pytest.mark.parametrize("variables", [1, 4])
def test_the_steps_have_one_right_answer(chat: str | None, variables: int) -> None:
    tokenizer = byte_tokenizer(chat)
    documents = ChainTask().load(settings(tokenizer, question="after", options={"chain_variables": variables}))
    assert len({document.id for document in documents}) == 3
    texts = set()
    for document in documents:
        request = document.request
        assert isinstance(request, Generate)
        context, question = tokenizer.decode(request.prompt_ids), tokenizer.decode(request.question_ids)
        steps = read(context)
        assert steps == document.reference
        assert len(steps) == 30
        assert {name for name, _ in steps} == set(VARIABLES[:variables])
        # The first line stands there, as the form of the others.
        assert question.endswith(f"{answer(steps)[0]}\nStep 2:")
        texts.add(context)
    assert len(texts) == 3


def test_before_is_the_same_text_as_one_prompt() -> None:
    tokenizer = byte_tokenizer()
    before, after = (ChainTask().load(settings(tokenizer, question=place)) for place in ("before", "after"))
    assert [item.request.prompt_ids for item in before] == [item.request.input_ids for item in after]
    assert [item.reference for item in before] == [item.reference for item in after]
    limited = ChainTask().load(settings(tokenizer, limit=2))
    assert [item.id for item in limited] == [item.id for item in before[:2]]


def document_of(**options: Any) -> tuple[ChainTask, Document, list[str]]:
    """A task, one of its documents, and the lines that are to be generated."""
    task = get_task("chain")
    assert isinstance(task, ChainTask)
    document = task.load(settings(byte_tokenizer(), options={"chain_steps": 21, "chain_variables": 2, **options}))[0]
    return task, document, answer(document.reference)[1:]


def test_scores_by_step() -> None:
    task, document, lines = document_of()

    def score(*lines: str) -> list[float]:
        # The prompt has opened the first of them.
        return list(task.score(document, Generated(text="\n".join(lines).removeprefix("Step 2:"))).values())

    assert score(*lines) == [1.0, 1.0]
    # It fits what is generated, with a few tokens to spare.
    assert isinstance(document.request, Generate)
    assert len("\n".join(lines)) < document.request.max_new_tokens < len("\n".join(lines)) + 40
    assert score(*lines[:10]) == [0.5, 0.0]
    assert score(*lines[:10], *lines[:1], *lines[11:]) == [0.95, 0.0]
    # What was said first counts, and another step than the prompt's is wrong whatever its sum.
    assert score(lines[0], lines[0].replace("Step 2", "Step 3"), *lines[1:]) == [0.95, 0.0]
    assert score("", " 5") == [0.0, 0.0]
    assert [metric.name for metric in task.metrics] == ["steps_right", "exact_match"]


def test_a_mistake_counts_once() -> None:
    task, document, lines = document_of(chain_variables=1)
    *head, value = lines[4].rpartition(" ")
    off = [*lines[:4], "".join(head) + str(int(value) + 1)]
    for line in lines[5:]:
        *head, value = line.rpartition(" ")
        off.append("".join(head) + str(int(value) + 1))
    scores = task.score(document, Generated(text="\n".join(off).removeprefix("Step 2:")))
    assert list(scores.values()) == [0.95, 0.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TaskError, match="more than the maximum of 1000 together: choose fewer --chain-steps"):
        ChainTask().load(settings(byte_tokenizer(), max_length=1_000))
    with pytest.raises(TaskError, match="chain_steps must be a whole number of at least 2"):
        ChainTask().load(settings(byte_tokenizer(), options={"chain_steps": 1}))
    with pytest.raises(TaskError, match="chain_variables must be a whole number of at least 1 and up to 4"):
        ChainTask().load(settings(byte_tokenizer(), options={"chain_variables": 5}))
