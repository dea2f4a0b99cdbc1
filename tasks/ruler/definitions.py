"""What the 13 tasks are: the official templates, settings, lengths of answers and rules of scoring.

Source: github.com/NVIDIA/RULER at c3f5e3b, ``scripts/synthetic.yaml`` and ``constants.py`` beside the generators and
the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["niah", "variables", "common", "frequent", "qa"]


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One task."""

    name: str
    kind: Kind
    """Which generator makes its prompts."""
    context: str
    """What stands before the question, with ``{context}``: what a cache compresses when the question comes after."""
    question: str
    answer_prefix: str
    """How the answer begins: the model goes on behind it."""
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the generator."""
    any_reference: bool = False
    """One of the references is enough (``string_match_part``); else their share counts (``string_match_all``)."""
    one_answer: bool = False
    """There is one reference, so that an answer is right or wrong."""

    @property
    def needs_essay(self) -> bool:
        return self.options.get("haystack") == "essay"


def _niah(name: str, *, haystack: str, keys: str = "words", values: str = "numbers", **counts: int) -> Definition:
    one = counts.get("values_each", 1) * counts.get("queries", 1) == 1
    some, are, all_are, ending = ("A", "is", "is", "") if one else ("Some", "are", "are all", "s")
    what = values[:-1] + ending
    return Definition(
        name=name,
        kind="niah",
        context=f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n{{context}}\n",
        question=f"What {all_are} the special magic {what} for {{query}} mentioned in the provided text?",
        answer_prefix=f" The special magic {what} for {{query}} mentioned in the provided text {are}",
        max_new_tokens=128,
        options={"haystack": haystack, "key_kind": keys, "value_kind": values, **counts},
        one_answer=one,
    )


def _qa(name: str, dataset: str) -> Definition:
    instruction = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    return Definition(
        name=name,
        kind="qa",
        context=f"{instruction}\n\nThe following are given documents.\n\n{{context}}\n\n",
        question=f"{instruction}\n\nQuestion: {{query}}",
        answer_prefix=" Answer:",
        max_new_tokens=32,
        options={"dataset": dataset},
        any_reference=True,
    )


DEFINITIONS = {
    item.name: item
    for item in (
        _niah("niah_single_1", haystack="noise"),
        _niah("niah_single_2", haystack="essay"),
        _niah("niah_single_3", haystack="essay", values="uuids"),
        _niah("niah_multikey_1", haystack="essay", needles=4),
        _niah("niah_multikey_2", haystack="needles"),
        _niah("niah_multikey_3", haystack="needles", keys="uuids", values="uuids"),
        _niah("niah_multivalue", haystack="essay", values_each=4),
        _niah("niah_multiquery", haystack="essay", needles=4, queries=4),
        Definition(
            name="vt",
            kind="variables",
            context="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            "{context}\n",
            question="Question: Find all variables that are assigned the value {query} in the text above.",
            answer_prefix=" Answer: According to the chain(s) of variable assignment in the text above, {count} "
            "variables are assigned the value {query}, they are: ",
            max_new_tokens=30,
        ),
        Definition(
            name="cwe",
            kind="common",
            context="Below is a numbered list of words. In these words, some appear more often than others. "
            "Memorize the ones that appear most often.\n{context}\n",
            question="Question: What are the 10 most common words in the above list?",
            answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
            max_new_tokens=120,
        ),
        Definition(
            name="fwe",
            kind="frequent",
            context="Read the following coded text and track the frequency of each coded word. Find the three most "
            "frequently appeared coded words. {context}\n",
            question="Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?",
            answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
            max_new_tokens=50,
        ),
        _qa("qa_1", "squad"),
        _qa("qa_2", "hotpotqa"),
    )
}

OFFLINE = tuple(name for name, item in DEFINITIONS.items() if not item.needs_essay and item.kind != "qa")
"""The six that need neither essays nor a data set."""
