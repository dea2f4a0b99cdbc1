"""What of a run is missing, failed or was cut, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.names import RECORD, RESULTS, SAMPLES, with_format
from bench.records.finished import Run
from bench.records.record import Record
from bench.records.row import Row
from bench.records.unfinished import unfinished

LISTED = 50
"""Cut documents that are named one by one."""


def named(row: Row) -> str:
    """A method with its format."""
    return with_format(row.method, row.quant_format)


def in_words(names: Sequence[str]) -> str:
    """Each name once: "a, b and c"."""
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"


def tally(names: Sequence[str]) -> str:
    return ", ".join(f"{name} in {count}" for name, count in Counter(names).items())


def problems_of(run: Run) -> list[str]:
    """What is missing, failed or was cut in a run."""
    said: list[str] = []
    record = run.record
    if not run.is_run:
        return said if record is not None or not run.timings else [f"no {RECORD}: what was timed is unknown"]
    if not run.rows:
        counts = tally([f"{sample.task}, {sample.cell}," for sample in run.samples.values()])
        said.append(f"no {RESULTS}: no task has ended; {SAMPLES} holds {len(run.samples)} answers: {counts}")
    if record is None:
        said.append(f"no {RECORD}: what made these results is unknown, and so is whether they may be compared")
    elif missing := unfinished(run.path, run.of_run, len(run.samples)):
        said.append(f"these are the results so far: {missing}")
    if not run.samples:
        said.append(f"no {SAMPLES}: no ratios by layer, and prompts cannot be compared with those of other runs")
    for failure in record.failures if isinstance(record, Record) else []:
        what = ", ".join(filter(None, (failure.task, failure.model))) or f"plugin {failure.plugin}"
        said.append(f"failed: {what}: {failure.error}")
    cut: dict[tuple[str, str], dict[str, None]] = {}
    for sample in run.samples.values():
        if sample.truncated:
            cut.setdefault((sample.task, sample.model), {})[sample.document] = None
    for (task, model), documents in cut.items():
        more = "" if len(documents) <= LISTED else f" and {len(documents) - LISTED} more"
        named = ", ".join(list(documents)[:LISTED])
        said.append(
            f"{task}, {model}: {len(documents)} prompts were longer than the context or --max-length and were cut: "
            f"{named}{more}"
        )
    return said
