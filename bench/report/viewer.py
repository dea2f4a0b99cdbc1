"""Documents, answers and what they cost, as the page's viewer takes them: an index, and the texts in chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.names import FULL, budget_text, with_format
from bench.records.document import Prompt
from bench.records.files.numbers import bytes_text, milliseconds_text, percent_text, seconds_text
from bench.records.files.text import write_output
from bench.records.finished import Run
from bench.records.sample import Measured, Sample
from bench.report.looks import colour_of, place_of

CHUNK = 400_000
"""Characters of a chunk, about: what is loaded to show one document."""
INLINE = 1_500_000
"""Characters of chunks that stand in the page itself."""
FACTS = ("length", "depth")
"""What ``info`` may say that documents are chosen by."""
DIGITS = 4
"""Significant ones of divergences and log-likelihoods."""
OLDEST = 1
"""Number of the repeat whose prompt stands for all."""

Asked = tuple[str, str, str, str]
"""Model, task, the document's own id, and the hash of its prompt."""


@dataclass
class _Document:
    """What was asked once, with every answer to it."""

    asked: Asked
    samples: list[tuple[int, Measured]] = field(default_factory=list)
    """Each with the number of its run."""


@dataclass(frozen=True)
class Samples:
    """What the page needs: JSON that no text in it can end, and so needs no escaping."""

    index: str
    chunks: list[str]
    """Those that stand in the page; none where they are files beside it."""
    documents: int


def safe_json(content: Any) -> str:
    """JSON for a ``<script>``: nothing in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def viewer_of(runs: Sequence[Run], beside: Path | None = None) -> Samples | None:
    """The samples of some runs; None where there are none.

    Args:
        beside: the folder for chunks that are too many for a page. Without one all of them stand in it.

    Raises:
        UserError: a file there cannot be written.
    """
    documents = _documents(runs)
    if not documents:
        return None
    cells = _cells(runs, documents)
    numbers = {key: number for number, key in enumerate(cells)}
    tasks = list(dict.fromkeys(document.asked[:2] for document in documents))
    inside, held, written = _Chunks(beside), [], 0
    for document in documents:
        written += 1
        entry, row = _entry(runs, document, numbers)
        held.append([tasks.index(document.asked[:2]), document.asked[2], *row, inside.add(entry)])
    inside.end()
    index = {
        "tasks": [{"model": model, "task": task, "sign": _sign(runs, model, task)} for model, task in tasks],
        "cells": list(cells.values()),
        "documents": held,
        "beside": beside.name if beside is not None and inside.files else None,
        "chunks": inside.count,
    }
    return Samples(safe_json(index), inside.texts, written)


class _Chunks:
    """Entries, some together in each chunk; in files from the moment that they are too many for the page."""

    def __init__(self, beside: Path | None) -> None:
        self._beside = beside
        self._entries: list[str] = []
        self._size = self._total = 0
        self.texts: list[str] = []
        self.count = 0
        self.files = False

    def add(self, entry: Any) -> tuple[int, int]:
        """One more. Returns the number of its chunk, and its place there."""
        text = safe_json(entry)
        if self._entries and self._size + len(text) > CHUNK:
            self.end()
        self._entries.append(text)
        self._size += len(text)
        return self.count, len(self._entries) - 1

    def end(self) -> None:
        """The chunk is full."""
        if not self._entries:
            return
        self.texts.append(f"[{','.join(self._entries)}]")
        self._total += self._size
        self.count += 1
        self._entries, self._size = [], 0
        if self._beside is not None and (self.files or self._total > INLINE):
            self.files = True
            first = self.count - len(self.texts)
            for number, text in enumerate(self.texts, start=first):
                write_output(self._beside / f"{number}.js", f"arkvChunk({number},{text});\n")
            self.texts = []


def _documents(runs: Sequence[Run]) -> list[_Document]:
    """What was asked, each with the samples of all runs; of a document that was asked in several ways by one run, those
    of the last one."""
    found: dict[Asked, _Document] = {}
    for number, run in enumerate(runs):
        newest: dict[tuple[str, str, str], str] = {}
        first: dict[tuple[str, str, str], str] = {}
        for item in run.samples.values():
            newest[item.model, item.task, item.document] = item.prompt_sha256
            if (item.repeat or OLDEST) == OLDEST:
                first[item.model, item.task, item.own_id] = item.prompt_sha256
        for item in run.samples.values():
            if newest[item.model, item.task, item.document] != item.prompt_sha256:
                continue
            own = (item.model, item.task, item.own_id)
            asked = (*own, first.get(own, item.prompt_sha256))
            found.setdefault(asked, _Document(asked)).samples.append((number, item))
    return list(found.values())


def _cells(runs: Sequence[Run], documents: Sequence[_Document]) -> dict[tuple[int, str], dict[str, Any]]:
    """Every cell of every run with what it is called, in the order of all tables."""
    samples = {(number, item.cell): item for document in documents for number, item in document.samples}
    order = sorted(samples, key=lambda key: (*place_of(samples[key].method), _size(samples[key]), key))
    labels: dict[tuple[int, str], str] = {}
    for key in order:
        item = samples[key]
        named = with_format(item.method, item.quant_format)
        words = [named, _budget(item), runs[key[0]].name if len(runs) > 1 else None]
        labels[key] = " ".join(filter(None, words))
    several = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    cells: dict[tuple[int, str], dict[str, Any]] = {}
    for key in order:
        number, cell = key
        item = samples[key]
        label = f"{labels[key]} ({cell})" if labels[key] in several else labels[key]
        about = budget_text(item.budget_unit, item.cache_size, item.cache_ratio)
        cells[key] = {"label": label, "about": about, "colour": colour_of(item.method), "run": number}
        if item.method == FULL:
            cells[key]["full"] = True
    return cells


def _size(item: Measured) -> float:
    """Larger budgets first."""
    return -(item.cache_ratio or item.cache_size or 0.0)


def _budget(item: Measured) -> str | None:
    if item.cache_ratio is not None:
        return f"{100 * item.cache_ratio:g} %"
    return None if item.cache_size is None else str(item.cache_size)


def _sign(runs: Sequence[Run], model: str, task: str) -> int | None:
    """1 where more is better, -1 where less is; None where no run says it."""
    for run in runs:
        higher = next((row.higher_is_better for row in run.rows if (row.model, row.task) == (model, task)), None)
        if higher is None and (recorded := run.of_run.tasks.get(task)) is not None:
            higher = recorded.higher_is_better
        if higher is not None:
            return 1 if higher else -1
    return None


def _entry(
    runs: Sequence[Run], document: _Document, numbers: Mapping[tuple[int, str], int]
) -> tuple[dict[str, Any], list[Any]]:
    """What is shown of a document, and what the table says of it: tokens, facts, and by cell the score and the first
    token that is another one than the full cache's (-1 where there is none)."""
    whole = list(_whole(runs, document))
    full = {(number, item.repeat): item for number, item in whole if item.method == FULL}
    answers: list[dict[str, Any]] = []
    scores: list[list[float]] = [[] for _ in numbers]
    differs: list[int | None] = [None] * len(numbers)
    for number, item in sorted(whole, key=lambda pair: (numbers[pair[0], pair[1].cell], pair[1].repeat or 0)):
        cell = numbers[number, item.cell]
        other = full.get((number, item.repeat))
        place = None if other is None or other is item else _differing(other, item)
        answers.append({"cell": cell, **_answer(item, place)})
        if item.score is not None:
            scores[cell].append(item.score)
        if place is not None:
            # Of repeats, the first that differs.
            differs[cell] = place if differs[cell] in (None, -1) else differs[cell]
    first = whole[0][1]
    facts = [value if isinstance(value := first.info.get(fact), int | float) else None for fact in FACTS]
    prompt = _prompt(runs, document)
    entry = {
        "parts": None if prompt is None else [_part(asdict(part)) for part in prompt.parts],
        "reference": first.reference,
        "info": first.info,
        "cut": first.truncated,
        "answers": answers,
    }
    means = [_rounded(fmean(mine)) if mine else None for mine in scores]
    return entry, [first.prompt_tokens, facts, means, differs]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["tokens"]:
        # Together they are the text.
        part.pop("text")
    else:
        part.pop("tokens")
    return part


def _whole(runs: Sequence[Run], document: _Document) -> Iterator[tuple[int, Sample]]:
    for number, run in enumerate(runs):
        mine = [item for of, item in document.samples if of == number]
        yield from ((number, item) for item in run.samples.whole(mine))


def _prompt(runs: Sequence[Run], document: _Document) -> Prompt | None:
    for number in dict.fromkeys(number for number, _ in document.samples):
        with suppress(KeyError):
            return runs[number].prompts[document.asked]
    return None


def _differing(full: Sample, item: Sample) -> int | None:
    """The first token that differs, -1 where none does; None where no tokens were generated."""
    if full.token_ids is None or item.token_ids is None:
        return None
    pairs = zip(full.token_ids, item.token_ids, strict=False)
    shorter = min(len(full.token_ids), len(item.token_ids))
    same = -1 if len(full.token_ids) == len(item.token_ids) else shorter
    return next((place for place, (one, other) in enumerate(pairs) if one != other), same)


def _answer(item: Sample, differs: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "repeat": item.repeat,
        "score": item.score,
        "scores": item.scores,
        "states": [_rounded(value) for value in (item.tokens_original, item.tokens_quantized, item.tokens_evicted)],
        "costs": _costs(item),
        "differs": differs,
    }
    if item.text is not None:
        found |= {"text": item.text, "tokens": item.token_texts}
    if item.compared is not None:
        found |= {"kl": [_rounded(value) for value in item.compared.kl], "agrees": item.compared.agrees}
    elif item.log_likelihoods is not None:
        found["choices"] = [[_rounded(scored.log_likelihood), scored.is_greedy] for scored in item.log_likelihoods]
    return {name: value for name, value in found.items() if value is not None}


def _costs(item: Sample) -> list[str]:
    """Bytes and times, written as in the tables."""
    share = f", {percent_text(item.kv_bytes / item.full_kv_bytes)} of full" if item.full_kv_bytes else ""
    times = [("TTFT", seconds_text(item.ttft_ms), "s"), ("TPOT", milliseconds_text(item.tpot_ms), "ms")]
    return [bytes_text(item.kv_bytes) + share, *(" ".join(parts) for parts in times if parts[1])]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
