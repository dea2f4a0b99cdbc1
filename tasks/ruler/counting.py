"""Aggregation: the words that appear most often, in a numbered list (``cwe``) or a coded text (``fwe``)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Sequence

from tasks.base import TaskError
from tasks.ruler.definitions import Definition
from tasks.ruler.makers import Maker, Text
from tasks.ruler.words import word_lists

COMMON = 10
"""Words that appear more often than the others, and are asked for."""


def numbered(words: Sequence[str]) -> str:
    """``1. river 2. quiet``."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


class CommonWords(Maker):
    """``cwe``. Units are different words. Each prompt has a worked example of its own before it.

    All prompts of a length have their words in one order, as officially: which places are a common word's is drawn
    with the seed alone.

    Args:
        length: tokens of prompt and answer; below 4,096 words appear less often.
    """

    step, least = 10, COMMON

    def __init__(self, definition: Definition, length: int, seed: int) -> None:
        self._definition, self._seed = definition, seed
        self.most = len(word_lists().all)
        self._often, self._seldom = (30, 3) if length >= 4096 else (6, 1)
        self._example = (40, 10, 3) if length >= 4096 else (20, 3, 1)

    def make(self, size: int, rng: random.Random, index: int) -> Text:
        example = self._prompt(*self._example, rng)
        text = self._prompt(size, self._often, self._seldom, rng)
        return text._replace(context=f"{example.whole} {numbered(example.references)}\n{text.context}")

    def _prompt(self, size: int, often: int, seldom: int, rng: random.Random) -> Text:
        words = rng.sample(word_lists().all, size)
        listed = words[:COMMON] * often + words[COMMON:] * seldom
        random.Random(self._seed).shuffle(listed)
        form = self._definition
        return Text(
            context=form.context.format(context=numbered(listed)),
            question=form.question,
            answer_prefix=form.answer_prefix,
            references=tuple(words[:COMMON]),
        )


class FrequentWords(Maker):
    """``fwe``. Units are words of a coded text, whose frequencies fall with the square of their rank (a zeta law). The
    most frequent one is a row of dots; the next three are asked for.

    All prompts of a length have their words in one order, as officially.

    Args:
        length: tokens of prompt and answer.

    Raises:
        TaskError: so few tokens have a vocabulary of fewer than four words.
    """

    _alpha, _letters = 2.0, 6
    _zeta = math.pi**2 / 6
    least = 27
    """The fourth word is there once."""

    def __init__(self, definition: Definition, length: int, seed: int) -> None:
        self._definition, self._seed = definition, seed
        self._room = length - definition.max_new_tokens
        self._vocabulary = self._room // 50
        if self._vocabulary < 4:
            raise TaskError(
                f"ruler:fwe: {length} tokens are too short: it has a word for every 50 beside the answer's "
                f"{definition.max_new_tokens}, and needs 4"
            )
        self.step = self._room // 32

    def make(self, size: int, rng: random.Random, index: int) -> Text:
        drawn: set[str] = set()
        while len(drawn) < self._vocabulary:
            drawn.add("".join(rng.choices(string.ascii_lowercase, k=self._letters)))
        words = sorted(drawn)
        rng.shuffle(words)
        words[0] = "..."
        coded = [
            word for rank, word in enumerate(words, start=1) for _ in range(int(size * rank**-self._alpha / self._zeta))
        ]
        random.Random(self._seed).shuffle(coded)
        form = self._definition
        return Text(
            context=form.context.format(context=" ".join(coded)),
            question=form.question,
            answer_prefix=form.answer_prefix,
            references=tuple(words[1:4]),
        )

    def size(self, tokens: Callable[[int], int], room: int) -> int:
        """In official steps: a 32nd of the tokens, from a sixth of them on."""
        size = max(self._room // self._letters, self.least)
        while tokens(size) < room:
            size += self.step
        return max(size - self.step, self.least)
