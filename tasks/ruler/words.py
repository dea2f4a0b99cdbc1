"""Random keys and values: words of the package wonderwords, numbers of seven digits, UUIDs."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import random
import uuid
from pathlib import Path

from tasks.base import TaskError


class WordLists:
    """The words, each once, and what they are known by.

    Raises:
        TaskError: wonderwords is not installed, or has no such list.
    """

    def __init__(self) -> None:
        # Found without an import, which would build what nobody here needs.
        spec = importlib.util.find_spec("wonderwords")
        if spec is None or spec.origin is None:
            raise TaskError("ruler takes its words from wonderwords, which is not installed: pip install wonderwords")
        folder = Path(spec.origin).parent / "assets"
        try:
            contents = [
                (folder / f"{kind}list.txt").read_text(encoding="utf-8") for kind in ("noun", "adjective", "verb")
            ]
        except OSError as error:
            raise TaskError(
                f"ruler: the installed wonderwords has no {error.filename}: install the version that constraints.txt "
                "names"
            ) from error
        self.nouns, self.adjectives, verbs = (
            sorted({line.rstrip() for line in text.splitlines()}) for text in contents
        )
        self.all = sorted({*self.nouns, *self.adjectives, *verbs})
        self.sha256 = hashlib.sha256("\0".join(contents).encode()).hexdigest()


word_lists = functools.cache(WordLists)


def draw_word(rng: random.Random) -> str:
    """An adjective and a noun: ``quiet-river``."""
    lists = word_lists()
    return f"{rng.choice(lists.adjectives)}-{rng.choice(lists.nouns)}"


def draw_number(rng: random.Random) -> str:
    """Seven digits, the first of them not 0."""
    return str(rng.randint(10**6, 10**7 - 1))


def draw_uuid(rng: random.Random) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


DRAWS = {"words": draw_word, "numbers": draw_number, "uuids": draw_uuid}
"""How a key or a value of a kind is drawn."""
