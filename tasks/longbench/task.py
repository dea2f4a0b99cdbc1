"""LongBench and LongBench-E as tasks: one per dataset, and a group of them under one name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.base import Answer, Document, Evaluation, Generate, Generated, Metric, Task, TaskGroup, TaskSettings, draw
from tasks.errors import TaskError, nearest
from tasks.longbench.data import load_rows
from tasks.longbench.datasets import BUCKETS, DATASETS, EXTENDED, Dataset, bucket
from tasks.longbench.metrics import BINARY, score
from tasks.longbench.options import LongBenchOptions
from tasks.longbench.prompts import build_prompt, template


class LongBenchTask(Task):
    """One dataset of LongBench, or of LongBench-E, in percent as published tables have it.

    ``max_length``, given by the user, is the official setting of that name: the prompt without chat template is cut in
    the middle to so many tokens. By default it is 31,500 for Llama models, as published, and else the model's context.

    ``limit`` takes the first documents; with ``skip_cut``, the first of those that need not be cut. An answer list that
    is empty scores 0 and counts, as in the official code.
    """

    Options = LongBenchOptions
    has_parts = True

    def __init__(self, dataset: Dataset, *, extended: bool = False) -> None:
        self.dataset = dataset
        self.extended = extended
        self.name = f"{'longbench-e' if extended else 'longbench'}:{dataset.name}"
        names = (dataset.metric, *self._bucket_metrics())
        binary = True if dataset.metric in BINARY else None
        self.metrics = tuple(Metric(name=name, low=0.0, high=100.0, binary=binary) for name in names)
        self._data_hash = ""

    def _bucket_metrics(self) -> tuple[str, ...]:
        return tuple(f"{self.dataset.metric},{name}" for name in BUCKETS) if self.extended else ()

    def load(self, settings: TaskSettings) -> list[Document]:
        options = LongBenchOptions.parse(self.name, settings.options)
        found = load_rows(self.dataset, settings.data_dir, extended=self.extended)
        self._data_hash = found.sha256
        form = template(self.dataset.name)
        documents: list[Document] = []
        for index in draw(len(found.rows), settings.sampling_ratio, settings.seed):
            if len(documents) == settings.limit:
                break
            row = found.rows[index]
            text, boundary = form.fill(row.context, row.input)
            prompt = build_prompt(
                self.dataset,
                text,
                settings,
                max_new_tokens=form.max_new_tokens,
                boundary=boundary if settings.question == "after" else None,
            )
            if prompt.cut_tokens and options.skip_cut:
                continue
            documents.append(
                Document(
                    id=f"{self.dataset.name}-{index}",
                    request=Generate(
                        prompt_ids=prompt.ids,
                        question_ids=prompt.question_ids,
                        max_new_tokens=form.max_new_tokens,
                        end_ids=self._end_ids(settings.tokenizer),
                    ),
                    reference=list(row.answers),
                    truncated=prompt.cut_tokens > 0,
                    info={
                        "row": index,
                        "length": row.length,
                        "all_classes": list(row.all_classes) or None,
                        "prompt_tokens": len(prompt.ids) + len(prompt.question_ids),
                        "cut_tokens": prompt.cut_tokens,
                        # Several questions may be asked about one text.
                        "source": hashlib.sha256(row.context.encode()).hexdigest()[:16],
                    },
                )
            )
        if not documents:
            raise TaskError(f"{self.name}: --skip-cut leaves none of {len(found.rows)} documents: all would be cut")
        return documents

    def _end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The newline for samsum, whose prompts make models go on with dialogues of their own."""
        return tuple(tokenizer.encode("\n", add_special_tokens=False)[-1:]) if self.dataset.name == "samsum" else ()

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        """The metric in percent and, for LongBench-E, the same under the name of the document's bucket."""
        percent = 100 * self._share(document, answer)
        scores = {self.dataset.metric: percent}
        if self.extended:
            scores[f"{self.dataset.metric},{bucket(document.info['length'])}"] = percent
        return scores

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        """The official means, before they are rounded to two digits. A bucket without documents has none."""
        answered = [document for document in documents if document.id in answers]
        shares = [self._share(document, answers[document.id]) for document in answered]
        lengths = [document.info["length"] for document in answered] if self.extended else None
        return Evaluation(
            values={
                self.dataset.metric if name is None else f"{self.dataset.metric},{name}": value
                for name, value in mean_scores(shares, lengths).items()
            }
        )

    def data_hash(self) -> str:
        return self._data_hash

    def prediction(self, document: Document, answer: Answer) -> dict[str, Any]:
        """A line of the official prediction files."""
        assert isinstance(answer, Generated)
        return {
            "pred": answer.text,
            "answers": document.reference,
            "all_classes": document.info["all_classes"],
            "length": document.info["length"],
        }

    def _share(self, document: Document, answer: Answer) -> float:
        assert isinstance(answer, Generated)
        return score(self.dataset, answer.text, document.reference, document.info["all_classes"] or ())


def mean_scores(shares: Sequence[float], lengths: Sequence[int] | None) -> dict[str | None, float]:
    """Means in percent of scores in [0, 1], computed as the official code does: over all, under None, and by bucket.

    Args:
        lengths: of the rows; None where there are no buckets.
    """
    if not shares:
        return {}
    means: dict[str | None, float] = {None: 100 * sum(shares) / len(shares)}
    for name in BUCKETS if lengths is not None else ():
        mine = [share for share, length in zip(shares, lengths or (), strict=True) if bucket(length) == name]
        if mine:
            means[name] = float(100 * np.mean(mine))
    return means


class LongBench(TaskGroup):
    """All datasets of LongBench, or the chosen ``parts``."""

    name = "longbench"
    part_names = tuple(DATASETS)
    extended = False

    def __init__(self, parts: Sequence[str] = ()) -> None:
        for part in parts:
            if part not in self.part_names:
                raise TaskError(f"{self.name} has no dataset {part!r}: {nearest(part, self.part_names)}", usage=True)
        chosen = dict.fromkeys(parts or self.part_names)
        self._tasks = tuple(LongBenchTask(DATASETS[part], extended=self.extended) for part in chosen)
        self.members = self._tasks

    def metrics(self) -> tuple[Metric, ...]:
        """None: each dataset has its own metric. Averages by category and language stand in the report."""
        return ()

    def evaluate(self, members: Mapping[str, Evaluation], counts: Mapping[str, int]) -> Evaluation:
        return Evaluation(values={})


class LongBenchE(LongBench):
    """The 13 datasets of LongBench-E, with scores by length."""

    name = "longbench-e"
    part_names = EXTENDED
    extended = True
