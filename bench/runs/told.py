"""Where questions begin inside their prompts, for methods that have to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.errors import UserError
from bench.methods.cell import Cell
from bench.methods.questions import AskedAfter
from tasks.base import Continuation, Document, Generate, LogLikelihood, Task, TaskError


def needing(cells: Sequence[Cell]) -> str | None:
    """The first method that has to know where in a prompt the question begins; None for none."""
    return next((cell.method for cell in cells if cell.impl.needs_question), None)


def check_questions(cells: Sequence[Cell], tasks: Sequence[Task]) -> None:
    """Raises :class:`UserError` (exit code 2) where a method needs the question in the prompt that it compresses, and a
    task has it elsewhere, or does not tell it from the context."""
    method = needing(cells)
    if method is None:
        return
    for task in tasks:
        if isinstance(task, AskedAfter):
            raise UserError(
                f"{method} compresses prompts that their questions stand in, and {task.inner.name} is to ask behind "
                "its contexts: give --question before",
                exit_code=2,
            )
        if not task.has_parts:
            raise UserError(
                f"{method} has to be told where in a prompt the question begins, and {task.name} tells no question "
                "from its context: leave one of the two out",
                exit_code=2,
            )


def with_questions(documents: Sequence[Document], divided: Sequence[Document]) -> list[Document]:
    """``documents``, whose questions stand in their prompts, told how many of the last tokens these are.

    Args:
        divided: the same with their questions behind the contexts.

    Raises:
        TaskError: a document has other tokens there.
    """
    others = {document.id: document for document in divided}
    return [replace(document, request=_told(document, others.get(document.id))) for document in documents]


def _told(document: Document, divided: Document | None) -> Generate | LogLikelihood:
    own, other = document.request, None if divided is None else divided.request
    if isinstance(own, Generate) and isinstance(other, Generate) and own.prompt_ids == other.input_ids:
        return replace(own, question_tokens=len(other.question_ids))
    if isinstance(own, LogLikelihood) and isinstance(other, LogLikelihood):
        pairs = zip(own.continuations, other.continuations, strict=True)
        return LogLikelihood(continuations=tuple(_told_of_one(document, *pair) for pair in pairs))
    raise _differs(document)


def _told_of_one(document: Document, own: Continuation, divided: Continuation) -> Continuation:
    if own.context_ids != divided.context_ids + divided.question_ids:
        raise _differs(document)
    return replace(own, question_tokens=len(divided.question_ids))


def _differs(document: Document) -> TaskError:
    return TaskError(
        f"document {document.id!r} has other tokens where its question stands behind the context: where the question "
        "begins in its prompt cannot be told"
    )
