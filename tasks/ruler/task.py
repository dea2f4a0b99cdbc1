"""RULER as tasks: one per kind of prompt, and a group of them under one name."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence

from tasks.base import Answer, Document, Evaluation, Generated, Metric, Task, TaskGroup, TaskSettings, draw
from tasks.errors import TaskError, nearest
from tasks.ruler.counting import CommonWords, FrequentWords
from tasks.ruler.definitions import DEFINITIONS, OFFLINE, Definition
from tasks.ruler.essays import STAND_IN, Essay
from tasks.ruler.makers import Maker, Text
from tasks.ruler.metrics import string_match_all, string_match_part
from tasks.ruler.niah import Needles
from tasks.ruler.options import RulerOptions
from tasks.ruler.prompts import Prompts
from tasks.ruler.qa import QuestionAnswering
from tasks.ruler.questions import Questions, load_questions
from tasks.ruler.variables import Variables
from tasks.ruler.words import word_lists

METRIC = "string_match"
"""In percent, of all references or of the best one: kvpress' tables call both so."""


def metric_name(*, stand_in: bool, length: int | None = None) -> str:
    """What a score is called, over all lengths or one of several, so that rows that are not comparable differ."""
    return METRIC + (f" ({STAND_IN})" if stand_in else "") + ("" if length is None else f",{length}")


class RulerTask(Task):
    """One of the 13, with prompts as the official code makes them.

    Prompt and answer together are never longer than asked. How many units (sentences, words, documents) go into a
    prompt is measured once for a length; a prompt that is longer all the same is made shorter step by step.

    Documents of a length do not depend on how many there are, nor on other lengths. ``sampling_ratio`` keeps that share
    of each length; ``limit`` bounds all lengths together, evenly.

    Args:
        in_stand_in_group: whether a group that this task is asked for in has others with essays; their average is then
            named as theirs are where there is no ``haystack``.
    """

    Options = RulerOptions
    has_parts = True

    def __init__(self, definition: Definition, *, in_stand_in_group: bool = False) -> None:
        self.definition = definition
        self.name = f"ruler:{definition.name}"
        self._in_stand_in_group = in_stand_in_group
        self.stands_in = False
        """Prompts are of made sentences where essays are official; known after :meth:`load`."""
        self.group_stands_in = False
        """The same of any task that was asked for together with this one."""
        self.lengths: tuple[int, ...] = ()
        """All that documents were made of."""
        self._data_hash = ""

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """The score and, of several lengths, that of each; known after :meth:`load`."""
        binary = True if self.definition.one_answer or self.definition.any_reference else None
        lengths = self.lengths if len(self.lengths) > 1 else ()
        names = [metric_name(stand_in=self.stands_in, length=length) for length in (None, *lengths)]
        return tuple(Metric(name=name, low=0.0, high=100.0, binary=binary) for name in names)

    def load(self, settings: TaskSettings) -> list[Document]:
        options = RulerOptions.parse("ruler", settings.options)
        for length in options.lengths:
            if length > settings.max_length:
                raise TaskError(
                    f"{self.name}: {length} tokens of prompt and answer exceed the maximum of {settings.max_length}: "
                    "choose shorter lengths"
                )
        source = Source(self.definition, options, settings)
        self._data_hash = source.data_hash
        self.lengths = tuple(sorted({*self.lengths, *options.lengths}))
        self.stands_in = self.definition.needs_essay and options.haystack is None
        self.group_stands_in = self._in_stand_in_group and options.haystack is None
        samples = min(options.samples, source.documents or options.samples)
        places = {
            (index, length)
            for length in options.lengths
            for index in draw(samples, settings.sampling_ratio, f"{settings.seed}-{length}")
        }
        series = {length: _Series(source, length) for length in options.lengths}
        made = [series[length].document(index) for index, length in sorted(places)[: settings.limit]]
        documents = [document for document in made if document is not None]
        if not documents:
            raise TaskError(
                f"{self.name}: no question fits {max(options.lengths)} tokens with its documents: choose longer lengths"
            )
        self.notes = source.notes(samples, documents, len(made) - len(documents))
        return documents

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        """The score, under the names that it counts for: of all lengths, of its own, and of the group."""
        assert isinstance(answer, Generated)
        match = string_match_part if self.definition.any_reference else string_match_all
        percent = match(answer.text, document.reference)
        lengths = (None, document.info["length"])
        marks = (self.stands_in, self.group_stands_in)
        return {metric_name(stand_in=mark, length=length): percent for mark in marks for length in lengths}

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        """Means over all documents and over those of each length."""
        scores: dict[str, list[float]] = {}
        for document in documents:
            if document.id in answers:
                for name, score in self.score(document, answers[document.id]).items():
                    scores.setdefault(name, []).append(score)
        return Evaluation(values={name: sum(mine) / len(mine) for name, mine in scores.items()})

    def data_hash(self) -> str:
        return self._data_hash


class Source:
    """What the documents of a task are made of, whatever their length.

    Raises:
        TaskError: a text or data set is missing.
    """

    def __init__(self, definition: Definition, options: RulerOptions, settings: TaskSettings) -> None:
        self.definition, self.settings = definition, settings
        self.prompts = Prompts(settings.tokenizer)
        self._haystack = options.haystack
        self._essay = Essay(options.haystack, settings.seed) if definition.needs_essay else None
        self._questions: Questions | None = None
        if definition.kind == "qa":
            self._questions = load_questions(definition.options["dataset"], settings.data_dir)
        self.shorter: list[int] = []
        """Lengths that the words of the language do not fill."""

    @property
    def documents(self) -> int | None:
        """How many there are; None where they are endless."""
        return None if self._questions is None else len(self._questions.questions)

    @property
    def data_hash(self) -> str:
        """Of everything that is not made from the seed alone."""
        parts = [
            *([word_lists().sha256] if self.definition.kind in ("niah", "common") else []),
            *([self._essay.sha256] if self._essay is not None else []),
            *([self._questions.sha256] if self._questions is not None else []),
        ]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest() if parts else ""

    def maker(self, length: int) -> Maker:
        definition, seed = self.definition, self.settings.seed
        if definition.kind == "niah":
            return Needles(definition, length, seed, self._essay)
        if definition.kind == "variables":
            return Variables(definition, length, seed, self.prompts.plain_tokens)
        if definition.kind == "common":
            return CommonWords(definition, length, seed)
        if definition.kind == "frequent":
            return FrequentWords(definition, length, seed)
        assert self._questions is not None
        return QuestionAnswering(definition, seed, self._questions)

    def notes(self, samples: int, documents: Sequence[Document], left_out: int) -> tuple[str, ...]:
        """What a person should know of the documents that were made."""
        found = []
        essay, most = self._essay, max(document.info["size"] for document in documents)
        if essay is not None and self._haystack is None:
            found.append(f"{STAND_IN}, made sentences where essays are official: --haystack FILE gives a text")
        elif essay is not None and most > essay.words:
            found.append(f"the haystack of {essay.words} words is repeated, as officially: {most} are needed")
        found += [f"prompts are shorter than {length} tokens: they hold every word there is" for length in self.shorter]
        if self._questions is not None and samples == self.documents:
            found.append(f"there are {samples} questions")
        if left_out:
            found.append(f"questions left out, whose documents are longer than asked: {left_out}")
        return tuple(found)


class _Series:
    """The documents of one length."""

    def __init__(self, source: Source, length: int) -> None:
        self._source, self._length = source, length
        self._maker: Maker | None = None
        self._size = 0

    @property
    def _room(self) -> int:
        return self._length - self._source.definition.max_new_tokens

    def _rng(self, what: str) -> random.Random:
        settings, name = self._source.settings, self._source.definition.name
        return random.Random(f"{settings.seed}-{name}-{self._length}-{what}")

    def _sized(self) -> Maker:
        """The generator, whose size is measured when the first document is asked for."""
        if self._maker is None:
            maker = self._source.maker(self._length)

            def tokens(size: int) -> int:
                return self._source.prompts.tokens(maker.make(size, self._rng(f"size {size}"), 0))

            self._size = maker.size(tokens, self._room)
            if self._size == maker.most:
                self._source.shorter.append(self._length)
            self._maker = maker
        return self._maker

    def document(self, index: int) -> Document | None:
        """Document ``index``; None where it is longer than asked at its least, and texts are given, not made.

        Raises:
            TaskError: the length is below what the task takes.
        """
        maker, source = self._sized(), self._source
        size = self._size
        while True:
            text = maker.make(size, self._rng(str(index)), index)
            tokens = source.prompts.tokens(text)
            if tokens <= self._room:
                break
            if size == maker.least:
                if maker.may_leave_out:
                    return None
                answer = source.definition.max_new_tokens
                raise TaskError(
                    f"ruler:{source.definition.name}: {self._length} tokens are too short: the shortest prompt takes "
                    f"{tokens}, and the answer {answer}"
                )
            # Officially what is no larger than a step is drawn until it fits, which given texts may never do.
            shorter = maker.step if size > maker.step else max(size // 10, 1)
            size = max(size - shorter, maker.least)
        return self._document(text, index, size, tokens)

    def _document(self, text: Text, index: int, size: int, tokens: int) -> Document:
        source = self._source
        depth = text.depth
        return Document(
            id=f"{self._length}-{index}",
            request=source.prompts.request(text, source.definition.max_new_tokens, source.settings.question),
            reference=list(text.references),
            info={
                "task": source.definition.name,
                "length": self._length,
                **({} if depth is None else {"depth": depth}),
                "size": size,
                "prompt_tokens": tokens,
            },
        )


class Ruler(TaskGroup):
    """The chosen tasks, or by default those that need no data set, and their average."""

    name = "ruler"
    part_names = tuple(DEFINITIONS)

    def __init__(self, parts: Sequence[str] = ()) -> None:
        for part in parts:
            if part not in self.part_names:
                raise TaskError(f"ruler has no task {part!r}: {nearest(part, self.part_names)}", usage=True)
        chosen = [DEFINITIONS[part] for part in dict.fromkeys(parts or OFFLINE)]
        essays = len(chosen) > 1 and any(item.needs_essay for item in chosen)
        self._tasks = tuple(RulerTask(item, in_stand_in_group=essays) for item in chosen)
        self.members = self._tasks

    def metrics(self) -> tuple[Metric, ...]:
        """The mean over the tasks, each with the same weight, over all lengths and of each; none of a single task."""
        lengths = sorted({length for task in self._tasks for length in task.lengths})
        return tuple(
            Metric(name=self._name(length), low=0.0, high=100.0)
            for length in ((None, *lengths) if len(lengths) > 1 else (None,))
            if len(self._tasks) > 1
        )

    def _name(self, length: int | None) -> str:
        return metric_name(stand_in=any(task.group_stands_in for task in self._tasks), length=length)

    def evaluate(self, members: Mapping[str, Evaluation], counts: Mapping[str, int]) -> Evaluation:
        values = {}
        for metric in self.metrics():
            # Every task gives its scores under the group's name too.
            mine = [
                evaluation.values[metric.name] for evaluation in members.values() if metric.name in evaluation.values
            ]
            if len(mine) == len(members):
                values[metric.name] = sum(mine) / len(mine)
        return Evaluation(values=values)
