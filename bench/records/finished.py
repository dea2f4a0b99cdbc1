"""Folders of runs as the page and the gate read them, and which of them may be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.names import DOCUMENTS, RECORD, RESULTS, SAMPLES, SPEED
from bench.records.document import Prompts
from bench.records.record import Fingerprint, Record, read_record
from bench.records.row import Row, read_results
from bench.records.sample import Measured
from bench.records.samples import Samples
from bench.records.shown import run_names
from bench.records.states import MapRecord, read_maps
from bench.records.timing import SpeedRecord, Timing, read_speed_record, read_timings


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a folder of ``run``, ``speed`` or ``inspect`` holds; what it lacks is None or empty."""

    name: str
    path: Path = Path()
    """Its folder, as it was given."""
    rows: list[Row] = field(default_factory=list)
    record: Record | SpeedRecord | None = None
    samples: Samples = field(default_factory=Samples)
    prompts: Prompts = field(default_factory=Prompts)
    timings: list[Timing] = field(default_factory=list)
    maps: list[MapRecord] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        """The folder is one of ``arkv-bench run``, begun at least."""
        return bool(self.rows or self.samples)

    @property
    def of_run(self) -> Record:
        """The record of a run; an empty one where there is none."""
        return self.record if isinstance(self.record, Record) else Record(fingerprint=Fingerprint())


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the order given, each with a name of its own.

    Raises:
        UserError: a folder with nothing to report, or a damaged file in it.
    """
    runs: list[Run] = []
    for path, name in zip(paths, run_names(paths), strict=True):
        if any(run.name == name for run in runs):
            continue
        timings = read_timings(path / SPEED) if (path / SPEED).is_file() else []
        maps = read_maps(path)
        samples = Samples(path / SAMPLES)
        # A run that was killed early has no results yet; folders of other commands never have.
        has_results = (path / RESULTS).is_file() or not (samples or timings or maps)
        runs.append(
            Run(
                name=name,
                path=path,
                rows=read_results(path) if has_results else [],
                record=record_of(path, is_speed=bool(timings)),
                samples=samples,
                prompts=Prompts(path / DOCUMENTS),
                timings=timings,
                maps=maps,
            )
        )
    return runs


def record_of(path: Path, *, is_speed: bool = False) -> Record | SpeedRecord | None:
    """The record in a folder; None where it has none."""
    if not (path / RECORD).is_file():
        return None
    return read_speed_record(path) if is_speed else read_record(path)


def difference(first: Run, second: Run, model: str, task: str, documents: Container[str] | None = None) -> str | None:
    """Why scores of the two on a model's task must not be compared; None where nothing speaks against it.

    Args:
        documents: those that are to be compared; None are all.
    """
    known, others = first.of_run.fingerprint, second.of_run.fingerprint
    for what, mine, other in (
        ("fingerprint of the model", known.models.get(model), others.models.get(model)),
        ("hash of the data", known.data.get(task), others.data.get(task)),
    ):
        if mine and other and mine != other:
            return f"another {what} ({mine[:12]}… and {other[:12]}…)"
    here, there = _prompts(first, model, task, documents), _prompts(second, model, task, documents)
    if not here or not there:
        return None
    if here.keys() != there.keys():
        absent = next(document for document in [*here, *there] if document not in here or document not in there)
        both = len(here.keys() & there.keys())
        return f"other documents ({len(here)} and {len(there)}, {both} in both), first {absent}"
    changed = [document for document in here if here[document] != there[document]]
    return f"other prompts for {len(changed)} of {len(here)} documents, the first is {changed[0]}" if changed else None


def _prompts(run: Run, model: str, task: str, documents: Container[str] | None) -> dict[str, str]:
    return {
        sample.document: sample.prompt_sha256
        for sample in run.samples.values()
        if sample.model == model and sample.task == task and (documents is None or sample.document in documents)
    }


BUDGET = ("method", "budget_unit", "cache_size", "cache_ratio")
"""What makes two cells the same method at the same budget."""
IDENTITY = (*BUDGET, "quant_format", "window_size")
"""What makes a cell the same one for a person, whatever its other settings."""


def same_cells(first: Iterable[Measured], second: Iterable[Measured], of: Sequence[str] = IDENTITY) -> dict[str, str]:
    """The second run's cell for each of the first's: the same settings, or the only one of the same identity.

    Args:
        of: what of a sample is its cell's identity.
    """
    before, now = ({item.cell: tuple(getattr(item, name) for name in of) for item in side} for side in (first, second))
    found = {cell: cell for cell in before if cell in now}
    counts = Counter(before.values()), Counter(now.values())
    for cell, identity in before.items():
        if cell not in found and counts[0][identity] == counts[1][identity] == 1:
            found[cell] = next(other for other, mine in now.items() if mine == identity)
    return found


def members(task: str, rows: Iterable[Row]) -> set[str]:
    """The task, or all that were asked for through the group of that name."""
    parts = {row.task for row in rows if row.part_of == task and row.task != task}
    return {task}.union(*(members(part, rows) for part in parts))


def comparable(runs: Sequence[Run], model: str, task: str) -> tuple[list[list[Run]], list[str]]:
    """The runs with rows of a model's task, in sets that may be compared, and a sentence for each that may not."""
    having = [run for run in runs if any((row.model, row.task) == (model, task) for row in run.rows)]
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
