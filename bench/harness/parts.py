"""Where the question of an lm-eval task begins: behind the examples of its prompt, and the passage it is about."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

PASSAGES = ("context", "passage", "article", "story", "document", "paragraph")
"""Fields of a row that a question is about, as the templates of tasks call them."""


def has_parts(config: Mapping[str, Any], num_fewshot: int | None) -> bool:
    """Whether a task's definition lets context and question be told apart: there are examples before the question, or
    its template names a passage.

    Args:
        config: the task's settings.
        num_fewshot: what the user asks for; None is the task's own.
    """
    if config.get("output_type") == "loglikelihood_rolling":
        return False
    shots = config.get("num_fewshot") if num_fewshot is None else num_fewshot
    return bool(shots) or bool(_passages(config.get("doc_to_text")))


def _passages(template: Any) -> list[str]:
    """Names of the passages that a template of lm-eval has."""
    if not isinstance(template, str):
        return []
    return [name for name in PASSAGES if re.search(rf"{{{{[^}}]*\b{name}\b", template)]


def source_of(task: Any, row: Mapping[str, Any]) -> str | None:
    """A hash of the passages that a question is about, the same for all questions about them; None without any."""
    texts = [row.get(name) for name in _passages(task.config.doc_to_text)]
    found = [text for text in texts if isinstance(text, str) and text.strip()]
    return hashlib.sha256("\n\n".join(found).encode()).hexdigest()[:16] if found else None


def question_at(task: Any, instance: Any) -> int | None:
    """The character of an instance's prompt that its question begins at; None where that cannot be told, or nothing
    stands before it.

    Args:
        task: lm-eval's task object.
        instance: one of its requests, the prompt its first argument.
    """
    prompt, asked = instance.args[0], task.doc_to_text(instance.doc)
    if not isinstance(asked, str) or not asked.strip():
        return None
    asked = asked.strip()
    # The newest one: an example may ask the same.
    begin = prompt.rfind(asked)
    if begin < 0:
        return None
    ends = [0]
    for name in _passages(task.config.doc_to_text):
        passage = instance.doc.get(name)
        if isinstance(passage, str) and passage.strip() and passage.strip() in asked:
            ends.append(asked.index(passage.strip()) + len(passage.strip()))
    behind = max(end for end in ends if end < len(asked))
    return begin + behind or None
