"""Fidelity: how close a method's next-token distributions stay to those of the full cache, on any text.

It needs no labels and no answers, so every token of every text is a measurement: differences that a score over a few
questions cannot show are plain here.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from tasks.base import (
    Answer,
    Compare,
    Compared,
    Document,
    Evaluation,
    Metric,
    Task,
    TaskError,
    TaskSettings,
    draw,
)
from tasks.jsonl import read_json_items, read_jsonl
from tasks.options import Count, TaskOptions, each_once
from tasks.text import made_sentences, read_bytes, read_text

SENTENCES = Path("sentences")
"""The value of ``text`` that stands for made sentences."""
_SENTENCES = 4000
"""How many of them: some 56,000 tokens."""
_READERS: Mapping[str, Callable[[str, bytes], Iterator[tuple[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json_items,
}
"""By the ending of a file's name; all others are plain text."""


class FidelityOptions(TaskOptions):
    """Options of ``fidelity``."""

    # A context of one token leaves nothing to compress.
    lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1), AfterValidator(each_once)] = Field(
        (2000,), description="Tokens of the prompt."
    )
    samples: Count = Field(8, description="Prompts per length.")
    continuation: Count = Field(64, description="Tokens that are read and compared behind a prompt.")
    text: Path | None = Field(
        None,
        description="A file of plain text, of JSON lines (.jsonl) or of JSON (.json), or sentences: made ones, the "
        "same everywhere. Default: the English reference texts that come with Python, which differ between its "
        "versions.",
    )
    text_field: str = Field("text", description="Field of the text in a file of JSON or JSON lines.")
    per_layer: bool = Field(False, description="Compare the outputs of the layers' attention as well.")


class FidelityTask(Task):
    """KL divergence of full || method over the vocabulary, top-1 agreement and change of negative log-likelihood.

    Options: :class:`FidelityOptions`.

    The prompts of a length begin at evenly spread places of the text, moved a little with the seed. ``sampling_ratio``
    keeps that share of them, and ``limit`` the first ones of every length, so many of all lengths together.

    ``kl``, ``top1_agreement`` and ``delta_nll`` are means over tokens, ``kl_p95`` is the 95th percentile of the tokens
    of all prompts (in one prompt's score: of its own). ``attention_error``, with ``per_layer``, is the relative error
    of the attention's output, mean over tokens and layers. The samples keep the numbers of every token and every layer.
    """

    name = "fidelity"
    metrics: tuple[Metric, ...] = (
        Metric(name="kl", higher_is_better=False, low=0.0, of_full=0.0),
        Metric(name="kl_p95", higher_is_better=False, low=0.0, of_full=0.0),
        Metric(name="top1_agreement", low=0.0, high=1.0, of_full=1.0),
        Metric(name="delta_nll", higher_is_better=False, of_full=0.0),
    )
    Options = FidelityOptions

    def __init__(self) -> None:
        self._data_hash = ""

    def load(self, settings: TaskSettings) -> list[Document]:
        options = FidelityOptions.parse(self.name, settings.options)
        if options.per_layer:
            error = Metric(name="attention_error", higher_is_better=False, low=0.0, of_full=0.0)
            self.metrics = (*type(self).metrics, error)
        text = _read(options)
        self._data_hash = hashlib.sha256(text.encode()).hexdigest()
        ids = tuple(settings.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        bos = settings.tokenizer.bos_token_id
        begin = () if bos is None else (bos,)
        source = options.text or "the reference text of this Python"
        documents = []
        for length in options.lengths:
            needed = length - len(begin) + options.continuation
            if length + options.continuation > settings.max_length:
                raise TaskError(
                    f"prompts of {length} tokens and {options.continuation} more do not fit "
                    f"{settings.max_length}: give shorter --lengths"
                )
            if len(ids) < needed:
                raise TaskError(f"{source} has {len(ids)} tokens, fewer than the {needed} of a prompt")
            kept = draw(options.samples, settings.sampling_ratio, f"{settings.seed} {length}")
            if settings.limit is not None:
                kept = kept[: -(-settings.limit // len(options.lengths))]
            for sample in kept:
                moved = random.Random(f"{settings.seed} {length} {sample}").random()
                start = int((sample + moved) / options.samples * (len(ids) - needed + 1))
                split = start + length - len(begin)
                documents.append(
                    Document(
                        id=f"fidelity-{length}-{sample}",
                        request=Compare(
                            context_ids=begin + ids[start:split],
                            continuation_ids=ids[split : split + options.continuation],
                            per_layer=options.per_layer,
                        ),
                        info={"length": length, "start": start},
                    )
                )
        return with_sources(documents[: settings.limit])

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        assert isinstance(answer, Compared)
        scores = {
            "kl": fmean(answer.kl),
            "kl_p95": _percentile(answer.kl, 0.95),
            "top1_agreement": fmean(answer.agrees),
            "delta_nll": fmean(answer.delta_nll),
        }
        return scores | ({"attention_error": fmean(answer.attention_error)} if answer.attention_error else {})

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        evaluation = super().evaluate(documents, answers)
        taken = [answers[document.id] for document in documents if document.id in answers]
        tokens = [kl for answer in taken if isinstance(answer, Compared) for kl in answer.kl]
        if not tokens:
            return evaluation
        return Evaluation(values={**evaluation.values, "kl_p95": _percentile(tokens, 0.95)})

    def data_hash(self) -> str:
        return self._data_hash


def with_sources(documents: Sequence[Document]) -> list[Document]:
    """The documents, with a source in their info: those whose texts overlap, directly or through others, are of one."""
    sources: dict[str, str] = {}
    source, reach = "", -1
    for document in sorted(documents, key=lambda document: document.info["start"]):
        start = document.info["start"]
        request = document.request
        assert isinstance(request, Compare)
        if start >= reach:
            source = f"from token {start}"
        reach = max(reach, start + len(request.context_ids) + len(request.continuation_ids))
        sources[document.id] = source
    return [replace(item, info={**item.info, "source": sources[item.id]}) for item in documents]


def _percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that at least ``share`` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _read(options: FidelityOptions) -> str:
    """The text to take prompts from. Raises :class:`TaskError`."""
    path = options.text
    if path is None:
        from pydoc_data.topics import topics

        # In the order of the topics' names: that of the module differs between versions.
        return "\n\n".join(topics[name] for name in sorted(topics))
    if path == SENTENCES:
        return " ".join(islice(made_sentences(random.Random(0)), _SENTENCES))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        return read_text(path)
    texts = []
    for where, row in reader(str(path), read_bytes(path)):
        text = row.get(options.text_field) if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise TaskError(f"{where}: no text in a field {options.text_field!r}")
        texts.append(text)
    return "\n\n".join(texts)
