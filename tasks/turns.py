"""Several questions in turn: one context, and a chat about it on one cache, in which every answer stays.

What a cache has lost for the first question it cannot give to the second, and each turn takes room of its budget. The
scores by turn show both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

from pydantic import Field

from tasks.base import Answer, Document, Generated, Metric, Task, TaskError, TaskSettings, draw
from tasks.needle import grow
from tasks.options import Count, Lengths, TaskOptions
from tasks.parts import Parts, asked, split
from tasks.text import made_sentences

NAMES = ("Alice", "Bruno", "Clara", "David")
"""Who is asked for; a document asks in an order of its own."""
TURNS = len(NAMES)
_DIGITS = 5
_INTRODUCTION = "Numbers of some people stand in the following text. Remember them. I will ask you about them later."
_FACT = "The number of {name} is {number}."
_QUESTION = "What is the number of {name}?"
_BEGUN = "The number of {name} is"
_MARK = "\ue000"
"""A character of the private use area: no template and no text of ours contains it."""


class TurnsOptions(TaskOptions):
    """Options of ``turns``."""

    lengths: Lengths = Field((2000,), description="Tokens of the context with the first question.")
    samples: Count = Field(8, description="Documents per length.")


class TurnsTask(Task):
    """Four numbers in one text, asked for one after the other: ``exact_match`` of the first number in each answer, mean
    over the turns and of each.

    Options: :class:`TurnsOptions`. ``limit`` takes the first documents, ``sampling_ratio`` a share of each length.
    """

    name = "turns"
    metrics = (
        Metric(name="exact_match", low=0.0, high=1.0, binary=False),
        *(Metric(name=f"exact_match,turn {turn}", low=0.0, high=1.0, binary=True) for turn in range(1, TURNS + 1)),
    )
    Options = TurnsOptions
    has_parts = True

    def load(self, settings: TaskSettings) -> list[Document]:
        options = TurnsOptions.parse(self.name, settings.options)
        chat = _Chat(settings.tokenizer)
        # A digit and a space are a token each; the rest is for a full stop and what follows it.
        max_new_tokens = _DIGITS + 5
        documents = []
        for length in options.lengths:
            for index in draw(options.samples, settings.sampling_ratio, f"{settings.seed}-{length}"):
                rng = random.Random(f"{settings.seed}-{length}-{index}")
                names = rng.sample(NAMES, TURNS)
                numbers = {name: str(rng.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)) for name in NAMES}
                prompt = _fill(chat, rng, names[0], numbers, length)
                turns = tuple(chat.later(name) for name in names[1:])
                taken = len(prompt.context_ids) + len(prompt.question_ids) + sum(map(len, turns))
                if (needed := taken + TURNS * max_new_tokens) > settings.max_length:
                    raise TaskError(
                        f"turns: a context of {length} tokens with its questions and answers takes {needed}, more than "
                        f"the maximum of {settings.max_length}: choose shorter lengths"
                    )
                request = asked(prompt, settings.question, turns=turns, max_new_tokens=max_new_tokens, stop=("\n",))
                reference = [numbers[name] for name in names]
                info = {"length": length, "names": names, "prompt_tokens": request.prompt_tokens}
                documents.append(Document(id=f"{length}-{index}", request=request, reference=reference, info=info))
        return documents[: settings.limit]

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        assert isinstance(answer, Generated)
        found = [re.search(r"\d+", text) for text in answer.turns]
        right = [
            float(match is not None and match[0] == number)
            for match, number in zip(found, document.reference, strict=True)
        ]
        of_turns = {f"exact_match,turn {turn}": score for turn, score in enumerate(right, start=1)}
        return {"exact_match": sum(right) / len(right), **of_turns}


class _Chat:
    """What stands around a context and its questions: the chat template, where there is one.

    Raises:
        TaskError: the template does not keep the messages apart.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        self._head, self._between, self._end = "", "\n\n", "\n"
        if self._chat:
            roles = ("user", "assistant", "user")
            shown = tokenizer.apply_chat_template(
                [{"role": role, "content": _MARK} for role in roles],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
            if shown.count(_MARK) != len(roles):
                raise TaskError("turns: the chat template does not show every message as it is")
            self._head, self._first, self._between, self._end = shown.split(_MARK)
        else:
            self._first = self._end

    def context(self, text: str) -> str:
        """Everything before the first question."""
        return f"{self._head}{_INTRODUCTION}\n\n{text}"

    def first(self, text: str, name: str) -> Parts:
        """The context and the first question with its begun answer."""
        context = self.context(text)
        asked = f"\n\n{_QUESTION.format(name=name)}{self._first}{_BEGUN.format(name=name)}"
        # A chat template has written the special tokens already.
        return split(self._tokenizer, context + asked, len(context), add_special_tokens=not self._chat)

    def later(self, name: str) -> tuple[int, ...]:
        """The end of an answer, a later question, and its begun answer."""
        asked = f"{self._between}{_QUESTION.format(name=name)}{self._end}{_BEGUN.format(name=name)}"
        return tuple(self._tokenizer.encode(asked, add_special_tokens=False, verbose=False))


def _fill(chat: _Chat, rng: random.Random, first: str, numbers: dict[str, str], length: int) -> Parts:
    """A prompt of at most ``length`` tokens, and less than a sentence short of it, with the numbers evenly apart."""
    # No tokenizer needs fewer than five tokens for a made sentence of eight words and more.
    sentences = list(islice(made_sentences(rng), length // 5 + 1))
    facts = [_FACT.format(name=name, number=number) for name, number in numbers.items()]

    def parts(count: int) -> Parts:
        return chat.first(" ".join(_spread(sentences[:count], facts)), first)

    def prompt(count: int) -> list[int]:
        found = parts(count)
        return [*found.context_ids, *found.question_ids]

    if len(empty := prompt(0)) > length:
        raise TaskError(f"turns: {length} tokens are too short: the questions alone take {len(empty)}")
    return parts(grow(prompt, len(sentences), empty, length)[0])


def _spread(sentences: Sequence[str], facts: Sequence[str]) -> list[str]:
    """The sentences with the facts at even distances, none of them at an end."""
    pieces = []
    for place, fact in enumerate(facts):
        begin, end = (round(at * len(sentences) / len(facts)) for at in (place, place + 1))
        middle = (begin + end) // 2
        pieces += [*sentences[begin:middle], fact, *sentences[middle:end]]
    return pieces
