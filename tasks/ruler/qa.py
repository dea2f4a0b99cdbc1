"""Questions about documents, with others around them (``qa_1``, ``qa_2``)."""

from __future__ import annotations

import random

from tasks.ruler.definitions import Definition
from tasks.ruler.makers import Maker, Text
from tasks.ruler.questions import Questions


class QuestionAnswering(Maker):
    """``qa_1`` and ``qa_2``. Units are documents; prompt ``index`` asks the question of that place.

    Documents of prompts with equally many are shuffled alike, as officially: what the answer stands in has the same
    place in all of them.
    """

    step = 10
    may_leave_out = True

    def __init__(self, definition: Definition, seed: int, questions: Questions) -> None:
        self._definition, self._seed, self._found = definition, seed, questions
        self._all = range(len(questions.documents))

    def make(self, size: int, rng: random.Random, index: int) -> Text:
        question = self._found.questions[index]
        # No prompt lacks what its answer stands in.
        size = max(size, len(question.documents))
        more = size - len(question.documents)
        if size >= len(self._all):
            chosen = [place % len(self._all) for place in range(size)]
        elif more > len(question.related):
            taken = {*question.documents, *question.related}
            others = [place for place in self._all if place not in taken]
            chosen = [*question.documents, *question.related, *rng.sample(others, more - len(question.related))]
        else:
            chosen = [*question.documents, *rng.sample(question.related, more)]
        documents = [self._found.documents[place] for place in chosen]
        random.Random(self._seed).shuffle(documents)
        shown = [f"Document {number}:\n{text}" for number, text in enumerate(documents, start=1)]
        form = self._definition
        (gold, *others_of_it) = question.documents
        return Text(
            context=form.context.format(context="\n\n".join(shown)),
            question=form.question.format(query=question.text),
            answer_prefix=form.answer_prefix,
            references=question.answers,
            needle=None if others_of_it else self._found.documents[gold],
        )
