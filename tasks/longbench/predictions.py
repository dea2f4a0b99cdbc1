"""Prediction files in the official form, ``<dataset>.jsonl``, and their scores, whoever wrote them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tasks.base import TaskError
from tasks.jsonl import read_jsonl
from tasks.longbench.data import answers_of, get_field
from tasks.longbench.datasets import DATASETS, Dataset
from tasks.longbench.metrics import score
from tasks.longbench.task import mean_scores

FOLDER, FOLDER_E = "pred", "pred_e"
"""Official names of the folders of predictions."""


@dataclass(frozen=True, kw_only=True)
class FileScore:
    """The scores of one file, in percent and not yet rounded."""

    dataset: Dataset
    n: int
    score: float
    """Over all rows."""
    buckets: dict[str, float] = field(default_factory=dict)
    """By length; for LongBench-E only, and only for buckets that have rows."""
    empty: int
    """Predictions without text: they score 0 and count."""
    unanswerable: int
    """Rows with an empty list of answers: they score 0 and count."""


def score_file(path: Path, *, extended: bool = False) -> FileScore:
    """Score one file as the official evaluation does.

    That takes the classes of the last row for all rows, which in the data are the same anyway.

    Args:
        extended: score by length as well, as for LongBench-E.

    Raises:
        TaskError: not a dataset's name, or a line that makes no sense (file, line and field are named).
    """
    dataset = DATASETS[dataset_of(path)]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for where, fields in read_jsonl(str(path), content):
        prediction: str = get_field(fields, "pred", where, lambda value: isinstance(value, str), "a text")
        answers, all_classes, length = answers_of(dataset, fields, where)
        if extended and length is None:
            raise TaskError(f"{where}: no field 'length', which scores by length need")
        rows.append((prediction, answers, all_classes, length or 0))
    if not rows:
        raise TaskError(f"{path} has no predictions")
    classes = rows[-1][2]
    shares = [score(dataset, prediction, answers, classes) for prediction, answers, _, _ in rows]
    means = mean_scores(shares, [length for *_, length in rows] if extended else None)
    return FileScore(
        dataset=dataset,
        n=len(rows),
        score=means.pop(None),
        buckets={name: value for name, value in means.items() if name is not None},
        empty=sum(not prediction.strip() for prediction, *_ in rows),
        unanswerable=sum(not answers for _, answers, *_ in rows),
    )


def dataset_of(path: Path) -> str:
    """The dataset that a prediction file is named after: what precedes the first full stop, as officially."""
    return path.name.partition(".")[0]
