"""A line of ``documents.jsonl``: what a document asked, as text; once, whatever answered it and how often."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from bench.records.files.json_ import read_lines

Key = tuple[str, str, str, str]
"""Model, task, the document's own id and the hash of what was asked."""
Role = Literal["context", "question", "continuation", "text"]
"""What a part of a prompt is: what is compressed, what is asked behind it, what is scored or compared, or a window of
a text that is scored whole."""

REMEDY = "remove the file: the run's own command writes it anew"


@dataclass(kw_only=True, slots=True)
class Part:
    """A part of a prompt, in the order that the model reads them."""

    role: Role
    text: str
    """With its special tokens."""
    tokens: tuple[str, ...] = ()
    """The text token by token, where answers have a number for each of them."""


@dataclass(kw_only=True, slots=True)
class Prompt:
    """The whole line."""

    model: str
    """Of whose tokenizer and template the text is."""
    task: str
    document: str
    """Its own id: repeats have one prompt."""
    prompt_sha256: str
    """As the first repeat's samples have it."""
    parts: tuple[Part, ...]

    @property
    def key(self) -> Key:
        """What it is the prompt of."""
        return self.model, self.task, self.document, self.prompt_sha256


_PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


def prompt_line(prompt: Prompt) -> str:
    """The line of a prompt, without its end."""
    return json.dumps(asdict(prompt), ensure_ascii=False)


class Prompts(Mapping[Key, Prompt]):
    """The prompts of a file by what they ask: the file is looked through when the first one is asked for, and each of
    them is read when it is.

    Args:
        path: the file; may be absent, as in the folder of an older suite or of a run that was to keep none.

    Whatever uses it may raise :class:`bench.errors.UserError`: a line makes no sense (file, line and field are named).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    @cached_property
    def _places(self) -> dict[Key, int]:
        if self.path is None:
            return {}
        lines = read_lines(self.path, lambda line: _PROMPT.validate_json(line, strict=True).key, REMEDY)
        return {key: place for place, key in lines}

    def add(self, prompt: Prompt, place: int) -> None:
        """One more, whose line begins at byte ``place``."""
        self._places[prompt.key] = place

    def __getitem__(self, key: Key) -> Prompt:
        place = self._places[key]
        assert self.path is not None
        with open(self.path, "rb") as file:
            file.seek(place)
            return _PROMPT.validate_json(file.readline(), strict=True)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
