"""What every generator has: texts of a size, and the largest size that fits a number of tokens."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The official filling that means nothing."""


class Text(NamedTuple):
    """A prompt before a chat template, and what is asked of it."""

    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    needle: str | None = None
    """The piece of the context that the answer stands in, where there is one such piece."""

    @property
    def whole(self) -> str:
        return self.context + self.question + self.answer_prefix

    @property
    def depth(self) -> float | None:
        """Where the needle begins: share of the context's characters before it."""
        return None if self.needle is None else round(self.context.rindex(self.needle) / len(self.context), 4)


class Maker(ABC):
    """Makes the prompts of one task and length. Its size is counted in units: sentences, words, documents."""

    step = 25
    """Units by which a prompt that is too long is made shorter."""
    least = 1
    """Units without which there is no prompt."""
    most: int | None = None
    """Units that there are; None where they are endless."""
    may_leave_out = False
    """A prompt may be longer than asked at its least: its texts are given, not made."""

    @abstractmethod
    def make(self, size: int, rng: random.Random, index: int) -> Text:
        """Prompt ``index`` with ``size`` units."""

    def size(self, tokens: Callable[[int], int], room: int) -> int:
        """The size whose prompt fills ``room`` tokens; ``tokens`` are those of a prompt of a size."""
        return largest(tokens, room, least=self.least, step=self.step, most=self.most)


def largest(tokens: Callable[[int], int], room: int, *, least: int, step: int, most: int | None = None) -> int:
    """The largest size whose prompt takes at most ``room`` tokens; ``least`` where none does.

    By doubling and bisection, as if tokens grew with the size: prompts are random, so they do only about.

    Args:
        tokens: of a prompt of a size.
    """
    low, high = least, max(step, least)
    while (most is None or high < most) and tokens(high) <= room:
        low, high = high, 2 * high
    high = high if most is None else min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    return low
