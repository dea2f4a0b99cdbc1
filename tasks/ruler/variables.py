"""Variable tracking: a chain of assignments in a text that means nothing; every variable of one value is asked for."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from itertools import pairwise

from tasks.ruler.definitions import Definition
from tasks.ruler.makers import NOISE, Maker, Text, largest

HOPS = 4
_EXAMPLE_TOKENS = 500


class Variables(Maker):
    """``vt``. Units are lines of noise. A worked example stands before every prompt: its noise, and the places of its
    assignments, are the same for all, its variables and their value are not.

    Args:
        length: tokens of prompt and answer.
        tokens: counts those of a plain text.
    """

    least = HOPS + 1

    def __init__(self, definition: Definition, length: int, seed: int, tokens: Callable[[str], int]) -> None:
        self._definition = definition
        self.step = 10 if length >= 4096 else 5

        def example(size: int) -> str:
            return self._example(size, random.Random(f"{seed} example {size}"), random.Random(seed))

        self._example_size = largest(lambda size: tokens(example(size)), _EXAMPLE_TOKENS, least=self.least, step=5)
        self._example_places = f"{seed} example {self._example_size}"

    def make(self, size: int, rng: random.Random, index: int) -> Text:
        example = self._example(self._example_size, random.Random(self._example_places), rng)
        text = self._prompt(size, _names(rng, 5), str(rng.randrange(10_000, 99_999)), rng)
        return text._replace(context=f"{example}\n\n{text.context}")

    def _example(self, size: int, places: random.Random, rng: random.Random) -> str:
        text = self._prompt(size, _names(rng, 3), str(rng.randrange(10_000, 99_999)), places)
        return f"{text.whole} {' '.join(text.references)}"

    def _prompt(self, size: int, names: tuple[str, ...], value: str, rng: random.Random) -> Text:
        """Every assignment, in the order of the chain, before a line of noise of its own."""
        # The blank behind a copied variable is official.
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        lines = [NOISE] * size
        for shift, place in enumerate(sorted(rng.sample(range(size), len(chain)))):
            lines.insert(place + shift, chain[shift])
        form = self._definition
        return Text(
            context=form.context.format(context="\n".join(lines)),
            question=form.question.format(query=value),
            answer_prefix=form.answer_prefix.format(query=value, count=HOPS + 1),
            references=names,
        )


def _names(rng: random.Random, letters: int) -> tuple[str, ...]:
    """A chain's variables, all different."""
    found: dict[str, None] = {}
    while len(found) < HOPS + 1:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return tuple(found)
