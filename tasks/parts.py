"""The parts of a prompt: the context, which can be compressed before its question is known, and the question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tasks.base import Generate, TaskError

_MARK = "\ue000"
"""A character of the private use area: no template contains it."""


class Parts(NamedTuple):
    """A prompt as token ids; ``context_ids + question_ids`` are those of the whole text."""

    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]


def asked(parts: Parts, question: str, **request: Any) -> Generate:
    """What is to be generated behind both parts.

    Args:
        question: where the question stands, ``after`` the compressed context; else in the prompt.
        request: the other fields of :class:`Generate`.
    """
    if question == "after":
        return Generate(prompt_ids=parts.context_ids, question_ids=parts.question_ids, **request)
    return Generate(prompt_ids=parts.context_ids + parts.question_ids, **request)


def split(tokenizer: Any, text: str, boundary: int, *, add_special_tokens: bool = True) -> Parts:
    """Tokenize a prompt as a whole, and divide it at the first token that covers any character of the question.

    So the tokens are the same as those of an undivided prompt. A tokenizer that does not say which characters a token
    covers is asked for the tokens of the context alone: what both begin with belongs to the context.

    Args:
        tokenizer: of transformers.
        text: context and question.
        boundary: the question begins at this character.
        add_special_tokens: as for the tokenizer; False where a chat template has written them.

    Raises:
        TaskError: one of the two parts has no token of its own.
    """
    options = {"add_special_tokens": add_special_tokens, "truncation": False, "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, **options)
        ids = found.input_ids
        ends = (place for place, (_, end) in enumerate(found.offset_mapping) if end > boundary)
        place = next(ends, len(ids))
    else:
        ids = tokenizer(text, **options).input_ids
        alone = tokenizer(text[:boundary], **options).input_ids
        differing = (at for at, (one, other) in enumerate(zip(ids, alone, strict=False)) if one != other)
        place = next(differing, min(len(ids), len(alone)))
    for what, tokens in (("context", place), ("question", len(ids) - place)):
        if not tokens:
            raise TaskError(f"a prompt without a {what} cannot be divided: --question before asks it whole")
    return Parts(tuple(ids[:place]), tuple(ids[place:]))


def rendered(render: Callable[[str], str], context: str, question: str) -> tuple[str, int]:
    """A prompt as a chat template has it, and the character that the question begins at.

    Args:
        render: the message of a user as the template writes it.

    Raises:
        TaskError: the template does not keep the message in one piece.
    """
    text = render(context + question)
    head, _, tail = render(f"{context}{_MARK}{question}").partition(_MARK)
    if head + tail != text:
        raise TaskError(
            "the chat template changes the text between context and question: --question before asks it whole"
        )
    return text, len(head)
