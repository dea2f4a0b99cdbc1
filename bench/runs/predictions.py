"""Predictions of LongBench in the official form, so that any tool can score them.

pred/<cell>/<dataset>.jsonl            with the lines' fields pred, answers, all_classes, length
pred_e/<cell>/<dataset>.jsonl          those of LongBench-E
pred/<model>/<cell>/<dataset>.jsonl    in a run over several models

Of answers to questions behind their contexts, <cell> ends in -question-after. Of sampled answers, these are the first
ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.methods.own_tasks import own_task
from bench.names import own_name
from bench.records.files.text import write_atomic
from bench.records.sample import Measured
from bench.records.samples import Samples
from bench.runs.kept import AnyCell
from tasks.base import Document, Generated, Task
from tasks.longbench.datasets import DATASETS
from tasks.longbench.predictions import FOLDER, FOLDER_E, dataset_of
from tasks.longbench.task import LongBenchTask


def clear_predictions(run: Path) -> None:
    """Remove the predictions of an earlier run, and nothing else."""
    for name in (FOLDER, FOLDER_E):
        for path in (run / name).rglob("*.jsonl"):
            if dataset_of(path) in DATASETS:
                path.unlink()


def write_predictions(
    run: Path,
    task: Task,
    documents: Sequence[Document],
    cells: Sequence[AnyCell],
    samples: Mapping[str, Mapping[str, Measured]],
    stored: Samples,
    *,
    model: str | None,
) -> None:
    """Write what every cell answered to a dataset of LongBench; nothing for other tasks.

    Args:
        run: the run folder.
        samples: by cell key and document id.
        stored: where their answers are read from.
        model: the folder to keep the models of a run apart, if it has several.
    """
    place = "-question-after" if task.name != own_name(task.name) else ""
    task = own_task(task)
    if not isinstance(task, LongBenchTask):
        return
    documents = [document for document in documents if document.repeat in (None, 1)]
    folder = run / (FOLDER_E if task.extended else FOLDER) / (model or "").replace("/", "_")
    for cell in cells:
        mine = samples[cell.key]
        taken = [mine[document.id] for document in documents if document.id in mine]
        answers = {item.document: item.text or "" for item in stored.whole(taken)}
        lines = [
            json.dumps(task.prediction(document, Generated(text=answers[document.id])), ensure_ascii=False)
            for document in documents
            if document.id in answers
        ]
        if lines:
            path = folder / f"{cell.key}{place}" / f"{task.dataset.name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, "\n".join(lines) + "\n")
