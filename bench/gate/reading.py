"""A run or a baseline, read; and a run made the baseline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.names import RECORD, RESULTS, SAMPLES
from bench.records.files.csv_ import DIGITS
from bench.records.files.text import read_bytes, write_atomic
from bench.records.finished import Run
from bench.records.record import read_record, record_text
from bench.records.row import read_results
from bench.records.sample import sample_line
from bench.records.samples import Samples

ANSWER: dict[str, Any] = {
    "text": None,
    "token_ids": None,
    "token_texts": None,
    "turns": None,
    "log_likelihoods": None,
    "compared": None,
    "reference": None,
    "info": {},
}
"""What a baseline leaves out of a sample: it is compared by scores, and must be small enough for a repository."""


def read(path: Path) -> Run:
    """A run or a baseline, as far as there is any: a run that was stopped may have samples and no results.

    Raises:
        UserError: no run folder, or a damaged file in it.
    """
    record = read_record(path)
    samples = Samples(path / SAMPLES)
    if not samples:
        raise UserError(f"{path} has no samples: nothing has been measured there")
    rows = read_results(path) if (path / RESULTS).is_file() else []
    return Run(name=str(path), rows=rows, record=record, samples=samples)


def write_baseline(run: Path, baseline: Path) -> int:
    """Make ``run`` the baseline, in the place of one that is there. Returns its size in bytes.

    The new folder is complete before it takes the old one's place, so that none is ever half of each.

    Raises:
        UserError: the run is not whole, or the folder holds something else.
    """
    found, record = read(run), read_record(run)
    if not record.finished or not found.rows or record.failures:
        what = "has failures" if record.failures else "has not ended"
        raise UserError(f"{run} {what}: a baseline must be whole; run its command again")
    baseline = baseline.resolve()
    if run.resolve() == baseline:
        raise UserError(f"--against {baseline}: that is the run itself; give the baseline a folder of its own", 2)
    if baseline.is_dir():
        if others := sorted({item.name for item in baseline.iterdir()} - {RECORD, RESULTS, SAMPLES}):
            raise UserError(f"--against {baseline}: holds more than a baseline ({others[0]}): give another folder", 2)
    elif baseline.exists():
        raise UserError(f"--against {baseline}: is no folder", 2)
    fingerprint = record.fingerprint.model_copy(update={"baseline": True})
    new, old = (baseline.with_name(f".{baseline.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        new.mkdir(parents=True)
        write_atomic(new / SAMPLES, "".join(f"{line}\n" for line in _short_lines(found.samples)))
        write_atomic(new / RESULTS, read_bytes(run / RESULTS))
        write_atomic(new / RECORD, record_text(record.model_copy(update={"fingerprint": fingerprint})))
        if baseline.is_dir():
            baseline.rename(old)
        new.rename(baseline)
    except OSError as error:
        if old.is_dir():
            old.rename(baseline)
        raise UserError(f"--against {baseline}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return sum(item.stat().st_size for item in baseline.iterdir())


def _short_lines(samples: Samples) -> Iterator[str]:
    """The lines of a baseline: without answers, and with as many digits as ``results.csv`` has."""
    for sample in samples.whole(samples.values()):
        yield sample_line(replace(sample, **ANSWER), digits=DIGITS)
