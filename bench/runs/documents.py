"""What a task gives, checked once: its documents when they are made, its scores as they come.

Whatever the code of a task raises becomes one line with the kind of the error, what it said and where. So does what it
gives and nobody could go on with; where the task is a plugin's, that line ends with file and line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from bench.errors import OthersCode, place
from bench.methods.own_tasks import file_of, own_task
from bench.records.sample import own_id
from tasks.base import (
    Answer,
    Compare,
    Continuation,
    Document,
    Evaluation,
    Generate,
    LogLikelihood,
    Metric,
    Request,
    Rolling,
    Task,
    TaskError,
    TaskGroup,
    TaskSettings,
)
from tasks.generation import refusal

REQUESTS = (Generate, LogLikelihood, Rolling, Compare)


def load_documents(task: Task, settings: TaskSettings, vocabulary: int | None) -> list[Document]:
    """The documents of a task, each checked.

    Args:
        vocabulary: how many tokens the model knows; None where it does not say.

    Raises:
        TaskError, UserError: the task cannot make them, or they are none that can be answered.
    """
    with _code_of(task):
        documents = list(task.load(settings))
    if not documents:
        raise _fault(task, "load", "has no documents")
    ids: set[str] = set()
    for document in documents:
        if not isinstance(document, Document):
            raise _fault(task, "load", f"gives {type(document).__name__} where a Document is asked for")
        if not isinstance(document.id, str) or not document.id:
            raise _fault(task, "load", f"a document's id is a text, not {document.id!r}")
        if document.id in ids:
            raise _fault(task, "load", f"two documents have the id {document.id!r}")
        ids.add(document.id)
        if said := _wrong(document, vocabulary):
            raise _fault(task, "load", f"document {document.id!r} {said}")
    return documents


def prompt_hash(document: Document) -> str:
    """Of everything that was asked: token ids and how to go on from them."""
    request = document.request
    asked = {"request": type(request).__name__, **dataclasses.asdict(request)}
    if not asked.get("generation"):
        # Of prompts without settings of their own it is what it was before there were any.
        asked.pop("generation", None)
    for name in ("turns", "sampling"):
        if not asked.get(name):
            asked.pop(name, None)
    for part in (asked, *asked.get("continuations", ()), *asked.get("windows", ())):
        if not part.get("question_ids"):
            # Likewise of prompts with their questions inside.
            part.pop("question_ids", None)
        # Told or not, the prompt is the same.
        part.pop("question_tokens", None)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _wrong(document: Document, vocabulary: int | None) -> str | None:
    """What of a document cannot be answered or written down, or None."""
    request = document.request
    if not isinstance(request, REQUESTS):
        return f"asks for {type(request).__name__}, which is no request"
    for what, ids in _sequences(request):
        if not ids:
            return f"has an empty {what}"
        if wrong := next((token for token in ids if type(token) is not int), None):
            return f"has {wrong!r} in its {what}, which is no whole number"
        low, high = min(ids), max(ids)
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            outside = low if low < 0 else high
            return f"has the token {outside} in its {what}; the model knows 0 to {(vocabulary or 1) - 1}"
    if isinstance(request, Generate) and request.max_new_tokens < 1:
        return f"asks for {request.max_new_tokens} new tokens"
    generation = request.generation if isinstance(request, Generate) else {}
    if said := refusal(generation):
        return f"asks for {said}"
    for name, value in (("info", document.info), ("reference", document.reference), ("generation", generation)):
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            return f"has no JSON as its {name}: {error}"
    return None


def _sequences(request: Request) -> list[tuple[str, Sequence[int]]]:
    """Every sequence of tokens that a request brings, with what it is; none of them may be empty."""
    if isinstance(request, Generate):
        turns = [("later question", turn) for turn in request.turns]
        return [("prompt", request.prompt_ids), *_question(request), *turns]
    if isinstance(request, Compare):
        return [("prompt", request.context_ids), ("continuation", request.continuation_ids)]
    parts: Sequence[Continuation] = request.windows if isinstance(request, Rolling) else request.continuations
    found: list[tuple[str, Sequence[int]]] = [
        pair
        for part in parts
        for pair in (("context", part.context_ids), *_question(part), ("continuation", part.token_ids))
    ]
    return found or [("list of continuations", ())]


def _question(part: Generate | Continuation) -> list[tuple[str, Sequence[int]]]:
    """A question behind its context, which need not be there."""
    return [("question", part.question_ids)] if part.question_ids else []


def scores_of(task: Task, document: Document, answer: Answer) -> dict[str, float]:
    """Every metric of one answer. Raises :class:`TaskError`, :class:`UserError`."""
    with _code_of(task):
        scores = task.score(_own(document), answer)
    if not isinstance(scores, Mapping):
        raise _fault(task, "score", f"its score of {document.id!r} is {scores!r}, no mapping of metrics to numbers")
    own = own_task(task)
    # What the mean over documents is taken of; a task with a rule of its own needs its headline only.
    needed = own.metrics if type(own).evaluate is Task.evaluate else own.metrics[:1]
    for metric in needed:
        if metric.name not in scores:
            raise _fault(task, "score", f"its score of {document.id!r} lacks the metric {metric.name!r}")
    return _numbers(task, "score", f"its score of {document.id!r}", scores)


def evaluation_of(task: Task, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
    """The task's own figures over answered documents: of repeats, the mean of each one's, by the documents that it has.

    Raises :class:`TaskError`, :class:`UserError`.
    """
    by_repeat: dict[int | None, list[Document]] = {}
    for document in documents:
        if document.id in answers:
            by_repeat.setdefault(document.repeat, []).append(document)
    if len(by_repeat) < 2:
        return _evaluation_of(task, documents, answers)
    found = [(len(mine), _evaluation_of(task, mine, answers).values) for mine in by_repeat.values()]
    total = sum(count for count, _ in found)
    names = [name for name in found[0][1] if all(name in values for _, values in found)]
    return Evaluation(values={name: sum(count * values[name] for count, values in found) / total for name in names})


def _own(document: Document) -> Document:
    """The document as its task knows it."""
    name = own_id(document.id, document.repeat)
    return document if name == document.id else dataclasses.replace(document, id=name)


def _evaluation_of(task: Task, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
    own = {document.id: _own(document) for document in documents}
    with _code_of(task):
        found = task.evaluate(
            list(own.values()), {own[name].id: answer for name, answer in answers.items() if name in own}
        )
    if not isinstance(found, Evaluation):
        raise _fault(task, "evaluate", f"its evaluation is {type(found).__name__} where an Evaluation is asked for")
    return Evaluation(values=_numbers(task, "evaluate", "its evaluation", found.values), stderr=found.stderr)


def group_evaluation(group: TaskGroup, members: Mapping[str, Evaluation], counts: Mapping[str, int]) -> Evaluation:
    """A group's own figures, see :meth:`TaskGroup.evaluate`. Raises :class:`TaskError`, :class:`UserError`."""
    with OthersCode(group.name, placed=True):
        return group.evaluate(members, counts)


def group_metrics(group: TaskGroup) -> tuple[Metric, ...]:
    """What a group gives. Raises :class:`TaskError`, :class:`UserError`."""
    with OthersCode(group.name, placed=True):
        return tuple(group.metrics())


def _numbers(task: Task, method: str, what: str, values: Mapping[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        if not isinstance(value, Real):
            raise _fault(task, method, f"{what} has {value!r} as {name!r}, which is no number")
    return {str(name): float(value) for name, value in values.items()}


def _code_of(task: Task) -> OthersCode:
    own = own_task(task)
    return OthersCode(task.name, file=file_of(own) if _is_others(own) else None, placed=True)


def _fault(task: Task, method: str, said: str) -> TaskError:
    """What a task gave is no use; of a plugin's, with the place of the method that gave it."""
    own = own_task(task)
    return TaskError(f"{task.name}: {said} ({_place(own, method)})" if _is_others(own) else f"{task.name}: {said}")


def _is_others(task: Task) -> bool:
    """The task is none of the suite's, lm-eval's included."""
    return type(task).__module__.split(".")[0] not in ("bench", "tasks")


def _place(task: Task, method: str) -> str:
    """Where a task's method is defined; for one that it inherits, where the task's own first one is."""
    mine = vars(type(task))
    found = [
        getattr(inspect.unwrap(mine[name]), "__code__", None) for name in (method, *mine) if callable(mine.get(name))
    ]
    code = next((code for code in found if code is not None), None)
    return place(file_of(task), None if code is None else code.co_firstlineno)
