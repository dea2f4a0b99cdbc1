"""Folders of runs as the page and the gate read them, and which of them may be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.costs.speed import Timing
from bench.engine.inspect import read_maps
from bench.errors import UserError
from bench.names import SPEED
from bench.report.rows import Row, read_results
from bench.report.speed import read_timings
from bench.report.wording import printable
from bench.runs.folder import DATA, RECORD, RESULTS, SAMPLES, read_record, read_samples

READ = ("model", "task", "document", "prompt_sha256", "cell", "truncated", "oq_ratios")
"""What the page takes from a sample."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a folder of ``run``, ``speed`` or ``inspect`` holds; what it lacks is None or empty."""

    name: str
    rows: list[Row] = field(default_factory=list)
    record: Mapping[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    """States maps, see :func:`bench.engine.inspect.read_maps`."""

    @property
    def is_run(self) -> bool:
        """The folder is one of ``arkv-bench run``, begun at least."""
        return bool(self.rows or self.samples)

    def fingerprint(self, name: str, key: str) -> Any:
        """A part of the record's fingerprint; None where it is unknown."""
        return ((self.record or {}).get("fingerprint", {}).get(name) or {}).get(key)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the order given, each with a name of its own.

    Raises:
        UserError: a folder with nothing to report, or a damaged file in it.
    """
    names = [path.resolve().name for path in paths]
    runs: list[Run] = []
    for path, name in zip(paths, names, strict=True):
        unique = name if names.count(name) == 1 else str(path)
        if any(run.name == printable(unique) for run in runs):
            continue
        timings = read_timings(path / SPEED) if (path / SPEED).is_file() else []
        maps = read_maps(path)
        samples = _samples(path / SAMPLES)
        # A run that was killed early has no results yet; folders of other commands never have.
        has_results = (path / RESULTS).is_file() or not (samples or timings or maps)
        runs.append(
            Run(
                name=printable(unique),
                rows=read_results(path) if has_results else [],
                record=_record(path, is_speed=bool(timings)),
                samples=samples,
                timings=timings,
                maps=maps,
            )
        )
    return runs


def _record(path: Path, *, is_speed: bool) -> Mapping[str, Any] | None:
    file = path / RECORD
    if not file.is_file():
        return None
    if not is_speed:
        return read_record(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file} is not the record of arkv-bench speed")
    return content


def _samples(file: Path) -> list[dict[str, Any]]:
    samples = read_samples(file)
    for sample in samples:
        missing = [name for name in READ if not isinstance(sample, dict) or name not in sample]
        if missing:
            raise UserError(f"{file}: a sample has no {missing[0]!r}; the run's own command measures what is missing")
    return samples


def difference(first: Run, second: Run, model: str, task: str) -> str | None:
    """Why scores of the two on a model's task must not be compared; None where nothing speaks against it."""
    for what, part, key in (("fingerprint of the model", "models", model), ("hash of the data", DATA, task)):
        mine, other = first.fingerprint(part, key), second.fingerprint(part, key)
        if mine and other and mine != other:
            return f"another {what} ({mine[:12]}… and {other[:12]}…)"
    if not first.samples or not second.samples:
        return None
    mine, other = _prompts(first, model, task), _prompts(second, model, task)
    if not mine or not other:
        return None
    if mine.keys() != other.keys():
        return f"other documents ({len(mine)} and {len(other)}, {len(mine.keys() & other.keys())} in both)"
    changed = sum(mine[document] != other[document] for document in mine)
    return f"other prompts for {changed} of {len(mine)} documents" if changed else None


def _prompts(run: Run, model: str, task: str) -> dict[str, str]:
    return {
        sample["document"]: sample["prompt_sha256"]
        for sample in run.samples
        if sample["model"] == model and sample["task"] == task
    }


def comparable(runs: Sequence[Run], model: str, task: str) -> tuple[list[list[Run]], list[str]]:
    """The runs with rows of a model's task, in sets that may be compared, and a sentence for each that may not."""
    having = [run for run in runs if any((row["model"], row["task"]) == (model, task) for row in run.rows)]
    sets: list[list[Run]] = []
    warnings = []
    for run in having:
        reasons = [(together[0], difference(together[0], run, model, task)) for together in sets]
        place = next((number for number, (_, reason) in enumerate(reasons) if reason is None), None)
        if place is not None:
            sets[place].append(run)
            continue
        sets.append([run])
        warnings += [
            f"{other.name} and {run.name} must not be compared on {task}, {model}: {reason}."
            for other, reason in reasons
        ]
    return sets, warnings
