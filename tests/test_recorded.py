"""Tables of runs under results/ are those that their samples give today, and contradict themselves nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.cli import main
from bench.errors import UserError
from bench.judge.verdict import ALPHA
from bench.names import CURVE, RESULTS, SAMPLES
from bench.records.row import Row, read_results
from scripts.recorded import RECORDS, recorded, tables
from tests.bench.conftest import read_lines, save_tiny_model
from tests.bench.runs.test_run import go

FOLDERS = recorded()
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(RECORDS).as_posix())


def test_every_run_is_found() -> None:
    assert sorted(file.parent for file in RECORDS.rglob(SAMPLES)) == FOLDERS
    assert len(FOLDERS) > 10


@each_folder
def test_tables_are_those_of_the_samples(folder: Path) -> None:
    for name, text in tables(folder).items():
        assert (folder / name).read_text(encoding="utf-8") == text, "run make docs"


def contradicts(low: float | None, high: float | None, p: float | None) -> bool:
    """Interval and p-value say other things of whether there is a difference, or one of them stands alone."""
    if low is None or high is None:
        # Documents that all have the same score: no difference, and nothing to be unsure of.
        return p is not None and p < 1
    return p is None or (low > 0 or high < 0) != (p < ALPHA)


def wrong(row: Row) -> list[str]:
    """What of a row cannot be."""
    said = []
    if contradicts(row.difference_low, row.difference_high, row.p_adjusted):
        said.append("interval and verdict")
    # Of a divergence it is the ratio of the two, whose interval is on the log scale.
    of_ratio = row.of_full == row.metric_low == 0
    ends = [None if end is None else end - of_ratio for end in (row.to_best_low, row.to_best_high)]
    if contradicts(ends[0], ends[1], row.p_to_best):
        said.append("interval and verdict against the best")
    if row.of_full is not None and (row.p_value, row.p_adjusted, row.difference) != (None, None, None):
        said.append("a distance from full is tested against full")
    if row.metric_low is not None and row.score_low is not None and row.score_low < row.metric_low:
        said.append("an interval below the least score")
    if row.leading and row.p_to_best is not None and row.p_to_best < ALPHA:
        said.append("leads, and is told from the best")
    return said


@each_folder
def test_no_row_contradicts_itself(folder: Path) -> None:
    rows = read_results(folder)
    assert [(row.task, row.metric, row.cell, said) for row in rows if (said := wrong(row))] == []
    for row in rows:
        assert row.binary is not None, "of an older suite"


def test_a_contradiction_is_seen() -> None:
    """Of a row of needle, as older suites judged it: an interval of the row alone, a p of all of them."""
    row = next(row for row in read_results(RECORDS / "needle") if row.method == "origin")
    assert wrong(row) == []
    assert wrong(row.model_copy(update={"p_adjusted": 0.125})) == ["interval and verdict"]
    assert wrong(row.model_copy(update={"difference_high": 0.1})) == ["interval and verdict"]
    assert wrong(row.model_copy(update={"to_best_high": 0.1})) == ["interval and verdict against the best"]
    tested = "a distance from full is tested against full"
    assert tested in wrong(row.model_copy(update={"of_full": 0.0}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of common sources, a score that is no mean over them, a curve."""
    folder = tmp_path_factory.mktemp("recorded")
    outcome, _ = go(
        save_tiny_model(folder / "tiny"), folder / "run", tasks=("needle", "fidelity"), lengths=(220, 250),
        samples=5, continuation=4, cache_ratio=(0.25,), cache_size=(), budget_unit="bytes",
    )  # fmt: skip
    assert outcome.failures == []
    return folder / "run"


def test_they_are_what_a_run_writes(finished: Path) -> None:
    assert tables(finished) == {name: (finished / name).read_text() for name in (RESULTS, CURVE)}


def test_the_report_writes_what_a_run_writes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(finished), "--format", "csv"])
    assert not ended.value.code
    assert capsys.readouterr().out == (finished / RESULTS).read_text()


def test_what_older_samples_do_not_say_stays_unknown(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    lines = read_lines(finished / SAMPLES)
    for line in lines:
        line["info"].pop("source", None)
        line.pop("start")
    (tmp_path / "run" / SAMPLES).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "run" / RESULTS).write_text(tables(tmp_path / "run")[RESULTS])
    rows, older = read_results(finished), read_results(tmp_path / "run")
    assert {row.sources for row in older} == {None} != {row.sources for row in rows}
    assert [row.score for row in older] == [row.score for row in rows]


def test_samples_of_other_documents_are_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    lines = (finished / SAMPLES).read_text().splitlines(keepends=True)
    (tmp_path / "run" / SAMPLES).write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"samples\.jsonl has other documents than results\.csv"):
        tables(tmp_path / "run")
