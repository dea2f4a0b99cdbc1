"""Passkey retrieval: one magic number hidden in plain sentences, asked for at the end.

The classic test of what a cache forgets. It needs no download: the haystack is made from the seed, of short everyday
sentences, because over technical text small models fail with every token kept, which measures nothing.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.base import Answer, Document, Generated, Metric, Task, TaskError, TaskSettings, draw
from tasks.options import Count, Lengths, TaskOptions
from tasks.parts import Parts, asked, split
from tasks.text import made_sentences, read_text

_INTRODUCTION = (
    "There is a special magic number hidden in the following text. Find it and remember it. "
    "I will ask you about it later."
)
_NEEDLE = "The special magic number mentioned in the text is {number}. Remember it."
_QUESTION = "What is the special magic number mentioned in the text?"
_ANSWER = "The special magic number mentioned in the text is"

_SLACK = 40
"""A prompt is fewer than this many tokens shorter than asked for: room for one whole sentence."""


class NeedleOptions(TaskOptions):
    """Options of ``needle``."""

    lengths: Lengths = Field((2000,), description="Tokens of the whole prompt, chat template included.")
    samples: Count = Field(8, description="Documents per length.")
    digits: Count = Field(7, description="Of the magic number.")
    haystack: Path | None = Field(None, description="A text file to hide the needle in. Default: made sentences.")


class NeedleTask(Task):
    """Passkey retrieval over prompt lengths and depths: ``exact_match`` of the first number in the answer.

    Options: :class:`NeedleOptions`.

    The depths of a length are ``(i + 0.5) / samples``: evenly spread, none at the very ends. A prompt is filled with
    whole sentences: it is never longer than asked, and less than 40 tokens shorter (where a sentence is longer than
    that, the last one is cut at a word).

    The context is all up to the end of the haystack: the introduction, which announces a question, stands in it.

    ``sampling_ratio`` keeps that share of the documents of each length. ``limit`` bounds all lengths together: it is
    split evenly over the lengths, and within a length over the depths. The documents that remain are the same ones,
    under the same ids, as without a limit.
    """

    name = "needle"
    metrics = (Metric(name="exact_match", low=0.0, high=1.0, binary=True),)
    Options = NeedleOptions
    has_parts = True

    def __init__(self) -> None:
        self._data_hash = ""

    def load(self, settings: TaskSettings) -> list[Document]:
        options = NeedleOptions.parse(self.name, settings.options)
        # A digit, a space and a full stop are one token each; the rest is for a colon or a quotation mark.
        max_new_tokens = options.digits + 5
        for length in options.lengths:
            if length + max_new_tokens > settings.max_length:
                raise TaskError(
                    f"needle: a prompt of {length} tokens and an answer of {max_new_tokens} exceed the maximum of "
                    f"{settings.max_length} tokens: choose shorter lengths"
                )
        haystack, self._data_hash = _read(options.haystack) if options.haystack else (None, "")
        frame = _Frame(settings.tokenizer)
        documents = []
        for length, limit in zip(options.lengths, _shares(settings.limit, len(options.lengths)), strict=True):
            for index in _spread(draw(options.samples, settings.sampling_ratio, f"{settings.seed}-{length}"), limit):
                rng = random.Random(f"{settings.seed}-{length}-{index}")
                number = str(rng.randrange(10 ** (options.digits - 1), 10**options.digits))
                depth = (index + 0.5) / options.samples
                # No tokenizer needs fewer than five tokens for a made sentence of eight words and more.
                sentences = _rotated(haystack, rng) if haystack else list(islice(made_sentences(rng), length // 5 + 1))
                needle = _NEEDLE.format(number=number)
                text, prompt_ids, needle_token = _fill(frame, sentences, needle, depth, length)
                parts = frame.parts(text) if settings.question == "after" else Parts(prompt_ids, ())
                documents.append(
                    Document(
                        id=f"{length}-d{depth:.2f}-{index}",
                        request=asked(parts, settings.question, max_new_tokens=max_new_tokens),
                        reference=number,
                        info={
                            "length": length,
                            "depth": depth,
                            # A place in prompts of several lengths is one question asked several times.
                            "source": f"{index} of {options.samples}",
                            "needle_token": needle_token,
                            "prompt_tokens": len(prompt_ids),
                        },
                    )
                )
        return documents

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        assert isinstance(answer, Generated)
        found = re.search(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+", answer.text)
        return {"exact_match": float(found is not None and found[0].replace(",", "") == document.reference)}

    def data_hash(self) -> str:
        return self._data_hash


class _Frame:
    """Everything of a prompt but the haystack: introduction, question, chat template and the begun answer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A character of the private use area: no template and no text of ours contains it.
        mark = "\ue000"
        request = f"{_INTRODUCTION}\n\n{mark}\n\n{_QUESTION}"
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        if self._chat:
            # Templates of hybrid reasoning models open a thought unless told not to; the others ignore the switch.
            request = tokenizer.apply_chat_template(
                [{"role": "user", "content": request}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
        else:
            request += "\n"
        self._head, self._tail = f"{request}{_ANSWER}".split(mark)

    def encode(self, haystack: str, *, whole: bool = True) -> list[int]:
        """Tokens of the prompt around ``haystack``, or only of what precedes its end."""
        text = self._head + haystack + (self._tail if whole else "")
        # A chat template has written the special tokens already.
        return self._tokenizer.encode(text, add_special_tokens=not self._chat, verbose=False)

    def parts(self, haystack: str) -> Parts:
        """The same tokens, divided where the haystack ends."""
        context = self._head + haystack
        return split(self._tokenizer, context + self._tail, len(context), add_special_tokens=not self._chat)


def _fill(
    frame: _Frame, sentences: Sequence[str], needle: str, depth: float, length: int
) -> tuple[str, tuple[int, ...], int]:
    """A haystack with its needle for a prompt of at most ``length`` tokens and hardly fewer, the prompt, and how many
    of its tokens precede the needle."""

    def halves(pieces: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        place = round(depth * len(pieces))
        return pieces[:place], pieces[place:]

    def text(pieces: Sequence[str]) -> str:
        before, after = halves(pieces)
        return " ".join([*before, needle, *after])

    def prompt(pieces: Sequence[str]) -> list[int]:
        return frame.encode(text(pieces))

    prompt_ids = prompt([])
    if len(prompt_ids) > length:
        raise TaskError(f"needle: {length} tokens are too short: the question alone takes {len(prompt_ids)}")
    count, prompt_ids = grow(lambda n: prompt(sentences[:n]), len(sentences), prompt_ids, length)
    pieces = list(sentences[:count])
    if length - len(prompt_ids) >= _SLACK and count < len(sentences):
        last = sentences[count]
        # A language without spaces is cut between characters.
        words, glue = (last.split(), " ") if " " in last else (list(last), "")
        count, prompt_ids = grow(lambda n: prompt([*pieces, glue.join(words[:n])]), len(words), prompt_ids, length)
        pieces = [*pieces, glue.join(words[:count])]
    if length - len(prompt_ids) >= _SLACK:
        raise TaskError(
            f"needle: the haystack is too short: it fills {len(prompt_ids)} of {length} tokens; "
            "give a longer text or shorter lengths"
        )
    before, _ = halves(pieces)
    return text(pieces), tuple(prompt_ids), len(frame.encode(" ".join(before), whole=False))


def grow(prompt: Callable[[int], list[int]], total: int, empty: list[int], length: int) -> tuple[int, list[int]]:
    """An ``n <= total`` whose ``prompt(n)`` is less than the slack short of ``length``, or else the largest that fits.

    ``empty`` is ``prompt(0)``, which fits. Interpolation search, since tokens grow almost linearly with ``n``: it takes
    two or three tokenizations of the prompt where bisection takes ten.
    """
    low, high, best = 0, total + 1, empty
    guess = 8
    while high - low > 1 and length - len(best) >= _SLACK:
        n = min(max(guess, low + 1), high - 1)
        ids = prompt(n)
        if len(ids) <= length:
            low, best = n, ids
        else:
            high = n
        guess = n + int((length - _SLACK // 2 - len(ids)) // max(1.0, (len(ids) - len(empty)) / n))
    return low, best


def _read(path: Path) -> tuple[list[str], str]:
    """Sentences of a text file, and the SHA-256 of the text."""
    text = read_text(path)
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n", text) if s.strip()]
    if not sentences:
        raise TaskError(f"needle: the haystack {path} is empty")
    return sentences, hashlib.sha256(text.encode()).hexdigest()


def _rotated(sentences: Sequence[str], rng: random.Random) -> list[str]:
    """The text from a random sentence on, its beginning after its end."""
    start = rng.randrange(len(sentences))
    return [*sentences[start:], *sentences[:start]]


def _shares(limit: int | None, parts: int) -> list[int | None]:
    """``limit`` split evenly, earlier parts taking what is left over."""
    if limit is None:
        return [None] * parts
    return [limit // parts + (part < limit % parts) for part in range(parts)]


def _spread(indices: Sequence[int], limit: int | None) -> list[int]:
    """``limit`` of the indices, evenly spread over them."""
    if limit is None or limit >= len(indices):
        return list(indices)
    return [indices[(2 * j + 1) * len(indices) // (2 * limit)] for j in range(limit)]
