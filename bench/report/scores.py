"""Scores of folders with LongBench predictions, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.errors import UserError
from bench.names import SAMPLES
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.markdown import markdown_table
from tasks.errors import nearest
from tasks.longbench.averages import Average, averages
from tasks.longbench.datasets import BUCKETS, DATASETS, EXTENDED
from tasks.longbench.predictions import FOLDER, FOLDER_E, FileScore, dataset_of, score_file

ON_THE_LEFT = ("folder", "dataset", "metric")


@dataclass(frozen=True, kw_only=True)
class FolderScores:
    """The scores of the files of one folder, which are the predictions of one method or model."""

    name: str
    files: list[FileScore]
    """In the official order of the datasets."""
    averages: list[Average]
    extended: bool


def score_folder(folder: Path, *, extended: bool = False) -> tuple[list[FolderScores], list[Path]]:
    """Score every folder within ``folder``, itself included, that holds predictions.

    Of a run folder only the predictions are read: those of LongBench-E if ``extended``.

    Returns:
        The scores, and the JSONL files that are not named after a dataset.

    Raises:
        UserError: no such folder, or no predictions in it.
        TaskError: a line that makes no sense (file, line and field are named).
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder{'' if folder.exists() else ': it does not exist'}", exit_code=2)
    own = folder / (FOLDER_E if extended else FOLDER)
    other = folder / (FOLDER if extended else FOLDER_E)
    if other.is_dir() and not own.is_dir():
        option = "without" if extended else "with"
        raise UserError(f"{folder} has no {own.name}, but {other.name}: score it {option} --longbench-e")
    top = own if own.is_dir() else folder
    known = EXTENDED if extended else tuple(DATASETS)
    files: dict[Path, list[Path]] = {}
    ignored = []
    for path in sorted(top.rglob("*.jsonl")):
        if dataset_of(path) in known:
            files.setdefault(path.parent, []).append(path)
        else:
            ignored.append(path)
    if not files and (folder / SAMPLES).is_file():
        raise UserError(f"{folder} is a run without LongBench predictions: arkv-bench report {folder} shows its scores")
    if not files:
        others = [path for path in ignored if path.name != SAMPLES]
        hint = f"; {others[0].name}: {nearest(dataset_of(others[0]), known)}" if others else ""
        raise UserError(
            f"{top} holds no predictions: they lie in files called after a dataset, such as trec.jsonl{hint}"
        )
    order = {name: place for place, name in enumerate(DATASETS)}
    scores = []
    for parent, paths in files.items():
        found = [
            score_file(path, extended=extended) for path in sorted(paths, key=lambda path: order[dataset_of(path)])
        ]
        name = str(parent.relative_to(top)) if parent != top else top.resolve().name
        means = averages({item.dataset.name: item.score for item in found}, known)
        scores.append(FolderScores(name=name, files=found, averages=means, extended=extended))
    return scores, ignored


def _percent(value: float | None) -> str:
    """With the two digits of the official results; empty where there is none."""
    return "" if value is None else f"{round(value, 2):.2f}"


def _columns(extended: bool) -> list[str]:
    return ["folder", "dataset", "metric", "n", "score", *(BUCKETS if extended else ()), "empty", "no answers"]


def _lines(scores: FolderScores) -> list[list[str]]:
    lines = []
    for item in scores.files:
        by_length = [_percent(item.buckets.get(name)) for name in BUCKETS] if scores.extended else []
        counts = [str(item.empty), str(item.unanswerable)]
        lines.append(
            [
                scores.name,
                item.dataset.name,
                item.dataset.metric,
                str(item.n),
                _percent(item.score),
                *by_length,
                *counts,
            ]
        )
    for average in scores.averages:
        by_length = [_percent(_bucket_mean(scores, average, name)) for name in BUCKETS] if scores.extended else []
        of = f"{average.datasets} of {average.of} datasets"
        lines.append([scores.name, _average_name(average), of, "", _percent(average.score), *by_length, "", ""])
    return lines


def _bucket_mean(scores: FolderScores, average: Average, name: str) -> float | None:
    of_bucket = {item.dataset.name: item.buckets[name] for item in scores.files if name in item.buckets}
    return next((other.score for other in averages(of_bucket, EXTENDED) if other.kind == average.kind), None)


def _average_name(average: Average) -> str:
    return f"average {average.kind}"


def print_scores(scores: Sequence[FolderScores], console: Console) -> None:
    """Print a table for each folder."""
    for item in scores:
        table = Table(title=item.name, title_justify="left", box=None)
        for column in _columns(item.extended)[1:]:
            table.add_column(column, justify="left" if column in ON_THE_LEFT else "right")
        for line in _lines(item):
            table.add_row(*map(Text, line[1:]), style="bold" if line[3] == "" else "")
        console.print(table)
        console.print()
    console.print("Scores in percent. empty: predictions without text; no answers: rows without any; both score 0.")


def to_markdown(scores: Sequence[FolderScores]) -> str:
    """One table over all folders."""
    columns = _columns(scores[0].extended)
    right = [place for place, name in enumerate(columns) if name not in ON_THE_LEFT]
    return "\n".join([*markdown_table(columns, (line for item in scores for line in _lines(item)), right=right), ""])


def to_csv(scores: Sequence[FolderScores]) -> str:
    """A line for each file and average, over all folders."""
    return csv_text(_columns(scores[0].extended), (line for item in scores for line in _lines(item)))


def to_json(scores: Sequence[FolderScores]) -> str:
    """By folder: ``result`` as the official ``result.json`` has it, the other counts, the averages."""
    content: dict[str, Any] = {}
    for item in scores:
        content[item.name] = {
            "result": {
                file.dataset.name: {
                    name: round(file.buckets[name], 2) if name in file.buckets else None for name in BUCKETS
                }
                if item.extended
                else round(file.score, 2)
                for file in item.files
            },
            "files": {
                file.dataset.name: {
                    "metric": file.dataset.metric,
                    "n": file.n,
                    "score": file.score,
                    "empty": file.empty,
                    "no_answers": file.unanswerable,
                }
                for file in item.files
            },
            "averages": {
                average.kind: {"score": average.score, "datasets": average.datasets, "of": average.of}
                for average in item.averages
            },
        }
    return json_text(content)
