"""Prompts and answers as text, for people: what a model reads and writes as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.records.document import Key, Part, Prompt, Role
from bench.records.sample import own_id
from bench.runs.documents import prompt_hash
from tasks.base import Compare, Document, Generate, LogLikelihood, Request

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character yet."""


def prompt_key(model: str, task: str, document: Document) -> Key:
    """What a document's prompt is found by; ``document`` as for :func:`prompt_of`."""
    return model, task, own_id(document.id, document.repeat), prompt_hash(document)


def prompt_of(model: str, task: str, document: Document, tokenizer: Any) -> Prompt:
    """What a document asks, as text.

    Args:
        document: the first of its repeats, where there are several.
    """
    parts: list[Part] = []
    newest: dict[Role, Part] = {}
    for part in _parts(document.request, tokenizer):
        # Choices of one question share what stands before them.
        if part.role in ("context", "question") and newest.get(part.role) == part:
            continue
        parts.append(part)
        newest[part.role] = part
    model, task, name, sha256 = prompt_key(model, task, document)
    return Prompt(model=model, task=task, document=name, prompt_sha256=sha256, parts=tuple(parts))


def _parts(request: Request, tokenizer: Any) -> Iterator[Part]:
    def part(role: Role, ids: Sequence[int]) -> Iterator[Part]:
        if ids:
            yield Part(role=role, text=_decoded(tokenizer, ids))

    if isinstance(request, Generate):
        yield from part("context", request.prompt_ids)
        for question in (request.question_ids, *request.turns):
            yield from part("question", question)
    elif isinstance(request, Compare):
        yield from part("context", request.context_ids)
        tokens = token_texts(tokenizer, request.continuation_ids)
        yield Part(role="continuation", text="".join(tokens), tokens=tokens)
    elif isinstance(request, LogLikelihood):
        for item in request.continuations:
            yield from part("context", item.context_ids)
            yield from part("question", item.question_ids)
            yield from part("continuation", item.token_ids)
    else:
        for window in request.windows:
            yield from part("text", window.token_ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text; together they are the text. Of a character that takes several tokens, the last
    one has all of it."""
    texts: list[str] = []
    begin = read = 0
    for end in range(1, len(ids) + 1):
        # A few tokens before it are enough to know how one is written.
        known, longer = _decoded(tokenizer, ids[begin:read]), _decoded(tokenizer, ids[begin:end])
        if longer.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(longer[len(known) :])
        begin, read = read, end
    return tuple(texts)
