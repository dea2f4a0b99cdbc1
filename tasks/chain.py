"""A long answer that can be checked: the values of variables, step by step over hundreds of generated tokens.

Reasoning writes far more than it reads. Every line of this answer needs one line of the prompt and one of what has been
written before, the variable's last value; what a cache has evicted of either makes the line wrong. It is made from the
seed and needs no download.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from tasks.base import Answer, Document, Generated, Metric, Task, TaskError, TaskSettings, draw
from tasks.options import Count, TaskOptions
from tasks.parts import Parts, asked, split

VARIABLES = ("a", "b", "c", "d")
_MOST = 30
"""The largest value, so that the sums stay ones that a small model can do."""
_CHANGED = 9
"""The most that one step adds or subtracts."""
_TASK = "Variables that are 0 at first are changed by these steps, one after the other:"
_ASK = "Write every step again, in the same order, each followed by the value that its variable has after it."
_SLACK = 24
"""Tokens that an answer may have beyond a right one."""


_LINE = re.compile(r"Step (\d+): (\w) ([+-]= \d+) -> \2 = (-?\d+)")


class ChainOptions(TaskOptions):
    """Options of ``chain``."""

    chain_steps: Annotated[int, Field(ge=2)] = Field(
        40, description="Steps of each document, some fifteen generated tokens each."
    )
    chain_variables: Annotated[int, Field(ge=1, le=len(VARIABLES))] = Field(
        1, description="Variables that the steps change, up to four: more of them are harder, at any cache."
    )
    samples: Count = Field(8, description="Documents.")


class ChainTask(Task):
    """Values of variables over many steps: ``steps_right``, the share of the steps that are right, and ``exact_match``,
    whether all are.

    A step is right if its line has the step as the prompt has it, and the value that follows from the one that the
    answer itself gave the variable last: a mistake counts once.

    Options: :class:`ChainOptions`. ``limit`` takes the first documents, ``sampling_ratio`` a share of them. The context
    has the steps. The question opens the answer with the first step, which is not scored, as an example of the form.
    """

    name = "chain"
    metrics = (
        Metric(name="steps_right", low=0.0, high=1.0, binary=False),
        Metric(name="exact_match", low=0.0, high=1.0, binary=True),
    )
    Options = ChainOptions
    has_parts = True

    def load(self, settings: TaskSettings) -> list[Document]:
        options = ChainOptions.parse(self.name, settings.options)
        documents = []
        for index in draw(options.samples, settings.sampling_ratio, f"{settings.seed}"):
            rng = random.Random(f"{settings.seed}-{options.chain_steps}-{options.chain_variables}-{index}")
            steps = _steps(rng, options.chain_steps, VARIABLES[: options.chain_variables])
            parts = _parts(settings.tokenizer, steps)
            answer = "\n".join(step.answer for step in steps[1:])
            most = len(settings.tokenizer.encode(answer, add_special_tokens=False, verbose=False)) + _SLACK
            taken = len(parts.context_ids) + len(parts.question_ids)
            if taken + most > settings.max_length:
                raise TaskError(
                    f"chain: {options.chain_steps} steps take {taken} tokens and their answer up to {most}, more than "
                    f"the maximum of {settings.max_length} together: choose fewer --chain-steps"
                )
            stop = (f"Step {options.chain_steps + 1}:", "\n\n")
            request = asked(parts, settings.question, max_new_tokens=most, stop=stop)
            documents.append(
                Document(
                    id=f"{options.chain_steps}-{options.chain_variables}-{index}",
                    request=request,
                    reference=[[step.variable, step.change] for step in steps],
                    info={"steps": options.chain_steps, "prompt_tokens": taken},
                )
            )
        return documents[: settings.limit]

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        assert isinstance(answer, Generated)
        # The prompt has done the first step, and opened the second. One that is written twice counts as it stood first.
        said: dict[int, tuple[str, int, int]] = {}
        for number, name, change, value in _LINE.findall(f"Step 2:{answer.text}"):
            said.setdefault(int(number), (name, int(change.replace("= ", "")), int(value)))
        values = dict.fromkeys(VARIABLES, 0)
        (first, begun), *others = document.reference
        values[first] = begun
        right = []
        for number, (name, change) in enumerate(others, start=2):
            line = said.get(number)
            right.append(line == (name, change, values[name] + change))
            # A step without a line is taken as done.
            values[name] = line[2] if line is not None and line[0] == name else values[name] + change
        return {"steps_right": sum(right) / len(right), "exact_match": float(all(right))}


class _Step(NamedTuple):
    number: int
    variable: str
    change: int
    value: int
    """Of the variable afterwards."""

    @property
    def text(self) -> str:
        return f"Step {self.number}: {self.variable} {'+' if self.change > 0 else '-'}= {abs(self.change)}"

    @property
    def answer(self) -> str:
        return f"{self.text} -> {self.variable} = {self.value}"


def _steps(rng: random.Random, count: int, variables: Sequence[str]) -> list[_Step]:
    """Steps of variables that begin with 0 and never leave their range."""
    values = dict.fromkeys(variables, 0)
    steps = []
    for number in range(1, count + 1):
        name = rng.choice(variables)
        change = rng.choice([by for by in range(-_CHANGED, _CHANGED + 1) if by and 0 <= values[name] + by <= _MOST])
        values[name] += change
        steps.append(_Step(number, name, change, values[name]))
    return steps


def _parts(tokenizer: Any, steps: list[_Step]) -> Parts:
    """The steps to do, and what opens the answer."""
    # A worked example is what small models copy.
    listed = "\n".join(step.text for step in steps)
    context = f"{_TASK}\n\n{listed}\n\n{_ASK}"
    # A character of the private use area: no template and no text of ours contains it.
    mark = "\ue000"
    chat = bool(getattr(tokenizer, "chat_template", None))
    framed = f"{mark}\n\n"
    if chat:
        framed = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    head, tail = framed.split(mark)
    context = head + context
    # A chat template has written the special tokens already.
    return split(tokenizer, f"{context}{tail}{_opening(steps)}", len(context), add_special_tokens=not chat)


def _opening(steps: list[_Step]) -> str:
    """The first step done, which shows the form of a line, and the begun second one."""
    return f"{steps[0].answer}\nStep 2:"
