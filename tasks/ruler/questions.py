"""Questions and documents of ``qa_1`` (SQuAD 2.0) and ``qa_2`` (HotpotQA, distractor), as the official files have them.

SQuAD is on the hub as a table only, whose rows are in the order of that file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tasks.base import TaskError, missing_rows
from tasks.hub import fetch


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set comes from."""

    files: tuple[str, ...]
    """What it may be called in a ``--data-dir``: as RULER has it, or as it is published."""
    repository: str
    """On the hub."""
    file: str
    revision: str


SOURCES = {
    "squad": Source(
        files=("squad.json", "dev-v2.0.json"),
        repository="rajpurkar/squad_v2",
        file="squad_v2/validation-00000-of-00001.parquet",
        revision="3ffb306f725f7d2ce8394bc1873b24868140c412",
    ),
    "hotpotqa": Source(
        files=("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
        repository="namlh2004/hotpotqa",
        file="hotpot_dev_distractor_v1.json",
        revision="7e54db4656209750ff487f6fdf8e39a66dba136b",
    ),
}


class Question(NamedTuple):
    """A question with its documents, as places in the list of all."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    """Those that go with it into every prompt: what the answer stands in, and for HotpotQA its distractors."""
    related: tuple[int, ...]
    """What is taken before any other: further paragraphs of the article."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A data set."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    """Each once, sorted."""
    sha256: str
    """Of the file's bytes."""


def load_questions(dataset: str, data_dir: Path | None) -> Questions:
    """A data set, from a folder (or its folder ``ruler``) or the hub.

    Raises:
        TaskError: it is not there, or damaged.
    """
    where, content = _from_disk(dataset, data_dir) if data_dir is not None else _from_hub(dataset)
    try:
        if where.endswith(".parquet"):
            whole: Any = _articles(content)
        else:
            whole = json.loads(content)
        found = _squad(whole) if dataset == "squad" else _hotpotqa(whole)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(f"ruler: {where} is not {dataset} as published ({type(error).__name__}: {error})") from error
    questions, documents = found
    if not questions:
        raise TaskError(f"ruler: {where} has no questions that can be answered")
    return Questions(questions=questions, documents=documents, sha256=hashlib.sha256(content).hexdigest())


def _from_disk(dataset: str, data_dir: Path) -> tuple[str, bytes]:
    tried = [folder / name for folder in (data_dir, data_dir / "ruler") for name in SOURCES[dataset].files]
    for path in tried:
        if path.is_file():
            try:
                return str(path), path.read_bytes()
            except OSError as error:
                raise TaskError(f"ruler: {path} cannot be read: {error.strerror}") from error
    raise TaskError(f"ruler: no {dataset}: looked for {', '.join(map(str, tried))}", reason=missing_rows(data_dir))


def _from_hub(dataset: str) -> tuple[str, bytes]:
    source = SOURCES[dataset]
    instead = f"without a connection, give --data-dir with {' or '.join(source.files)}"
    path = fetch("ruler", source.repository, source.file, source.revision, instead)
    return str(path), path.read_bytes()


def _places(texts: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    documents = tuple(sorted(set(texts)))
    return documents, {text: place for place, text in enumerate(documents)}


def _squad(whole: Mapping[str, Any]) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    articles = [article["paragraphs"] for article in whole["data"]]
    documents, places = _places(paragraph["context"] for article in articles for paragraph in article)
    questions = []
    for article in articles:
        of_article = [places[paragraph["context"]] for paragraph in article]
        for paragraph in article:
            place = places[paragraph["context"]]
            related = tuple(other for other in of_article if other != place)
            questions += [
                Question(item["question"], tuple(answer["text"] for answer in item["answers"]), (place,), related)
                for item in paragraph["qas"]
                if not item["is_impossible"]
            ]
    return tuple(questions), documents


def _articles(content: bytes) -> dict[str, Any]:
    """SQuAD's table in the form of its file: rows of one title in a row are an article, of one context a paragraph."""
    import pandas as pd

    articles: list[dict[str, Any]] = []
    for row in pd.read_parquet(io.BytesIO(content)).to_dict("records"):
        if not articles or articles[-1]["title"] != row["title"]:
            articles.append({"title": row["title"], "paragraphs": []})
        paragraphs = articles[-1]["paragraphs"]
        if not paragraphs or paragraphs[-1]["context"] != row["context"]:
            paragraphs.append({"context": row["context"], "qas": []})
        answers = [{"text": text} for text in row["answers"]["text"]]
        paragraphs[-1]["qas"].append({"question": row["question"], "answers": answers, "is_impossible": not answers})
    return {"data": articles}


def _hotpotqa(whole: Iterable[Mapping[str, Any]]) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    rows = [
        (row["question"], row["answer"], [f"{t}\n{''.join(lines)}" for t, lines in row["context"]]) for row in whole
    ]
    documents, places = _places(text for _, _, texts in rows for text in texts)
    return tuple(
        Question(question, (answer,), tuple(places[text] for text in texts), ()) for question, answer, texts in rows
    ), documents
