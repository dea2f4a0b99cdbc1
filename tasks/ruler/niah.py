"""Needles in a haystack: keys with magic values among sentences, some of which are asked for."""

from __future__ import annotations

import random

from tasks.ruler.definitions import Definition
from tasks.ruler.essays import Essay
from tasks.ruler.makers import NOISE, Maker, Text
from tasks.ruler.words import DRAWS

_DEPTHS = tuple(round(100 * place / 39) for place in range(40))
"""Where needles may stand in an essay, in percent of its sentences; each at most once."""


class Needles(Maker):
    """The eight ``niah`` tasks. Units are sentences, or words of an essay.

    Args:
        length: tokens of prompt and answer.
        essay: the haystack of the tasks that need one.
        seed: needles are put in one order for all prompts, as officially.
    """

    def __init__(self, definition: Definition, length: int, seed: int, essay: Essay | None) -> None:
        options = definition.options
        self._definition, self._seed, self._essay = definition, seed, essay
        self._haystack: str = options["haystack"]
        self._draw_key, self._draw_value = DRAWS[options["key_kind"]], DRAWS[options["value_kind"]]
        self._value_kind: str = options["value_kind"]
        self._keys, self._values_each = options.get("needles", 1), options.get("values_each", 1)
        self._queries = options.get("queries", 1)
        self.step = 500 if essay is not None else 25 if length >= 4096 else 5
        # As many places as needles; an essay has its own.
        self.least = 1 if essay is not None else self._keys * self._values_each

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self._value_kind} for {key} is: {value}."

    def make(self, size: int, rng: random.Random, index: int) -> Text:
        values: dict[str, list[str]] = {}
        while len(values) < self._keys:
            values[self._draw_key(rng)] = [self._draw_value(rng) for _ in range(self._values_each)]
        needles = [self._needle(key, value) for key, mine in values.items() for value in mine]
        random.Random(self._seed).shuffle(needles)
        context = self._in_essay(size, needles, rng) if self._essay is not None else self._in_lines(size, needles, rng)
        asked = rng.sample(list(values), self._queries)
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        answers = tuple(value for key in asked for value in values[key])
        form = self._definition
        return Text(
            context=form.context.format(context=context),
            question=form.question.format(query=query),
            answer_prefix=form.answer_prefix.format(query=query),
            references=answers,
            needle=self._needle(asked[0], answers[0]) if len(answers) == 1 else None,
        )

    def _in_lines(self, size: int, needles: list[str], rng: random.Random) -> str:
        if self._haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [self._needle(self._draw_key(rng), self._draw_value(rng)) for _ in range(size)]
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _in_essay(self, size: int, needles: list[str], rng: random.Random) -> str:
        assert self._essay is not None
        found = self._essay.sentences(size)
        places = sorted(int(len(found) * depth / 100) for depth in rng.sample(_DEPTHS, len(needles)))
        pieces: list[str] = []
        for start, end, needle in zip([0, *places], places, needles, strict=False):
            # Officially nothing before the first sentence is a piece too, and leaves a blank.
            pieces += [" ".join(found[start:end]), needle]
        return " ".join([*pieces, " ".join(found[places[-1] :])])
