"""The haystack of the tasks with essays: words of a text, and where its sentences end."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tasks.base import TaskError
from tasks.text import made_sentences, read_text

STAND_IN = "stand-in haystack"
"""What rows say that are not of the user's text."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")


def sentences(text: str) -> list[str]:
    """A text cut behind full stops, question and exclamation marks that a capital or a digit follows.

    Officially nltk's punkt model does this, which is a download; it only decides between which words a needle may
    stand.
    """
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        found.append(text[start : match.end()].rstrip())
        start = match.end()
    return [*found, text[start:]]


class Essay:
    """A text as words, from its beginning on and repeated where it ends.

    Args:
        path: a text file, or the official ``PaulGrahamEssays.json``, whose ``text`` it is. None: made sentences.
        seed: of the made sentences, which never end.

    Raises:
        TaskError: the file cannot be read or holds no word.
    """

    def __init__(self, path: Path | None, seed: int) -> None:
        self._more: Iterator[str] | None = None
        self._words: list[str] = []
        self.sha256 = ""
        self._cut: dict[int, list[str]] = {}
        if path is None:
            self._more = made_sentences(random.Random(f"{seed} essay"))
            return
        text = read_text(path)
        if path.suffix == ".json":
            text = _text_of(path, text)
        self._words = text.split()
        if not self._words:
            raise TaskError(f"ruler: the haystack {path} is empty")
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    @property
    def words(self) -> int:
        """Of the text; of made sentences so far."""
        return len(self._words)

    def sentences(self, count: int) -> list[str]:
        """The sentences of the first ``count`` words."""
        if count not in self._cut:
            while self._more is not None and len(self._words) < count:
                self._words += next(self._more).split()
            repeats = -(-count // len(self._words))
            self._cut[count] = sentences(" ".join((self._words * repeats)[:count]))
        return self._cut[count]


def _text_of(path: Path, content: str) -> str:
    try:
        text = json.loads(content)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise TaskError(f'ruler: the haystack {path} is no JSON of the form {{"text": "..."}}')
    return text
