"""Rows per length and per depth, each with statistics of its own documents."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from bench.cli import main
from bench.errors import UserError
from bench.judge.stats import mean_interval
from bench.records.finished import read_runs
from bench.report.by import split_by
from bench.report.figures.heat import fact_figures, task_figure
from tests.bench.lines import line
from tests.bench.report.test_report import row, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for cell in ("full", "mix-512"):
        for number in range(20):
            length = 1000 if number < 12 else 4000
            score = float(cell == "full" or length == 1000 or number == 15)
            lines.append(
                line(
                    f"d{number}",
                    cell,
                    model="tiny",
                    task="needle",
                    score=score,
                    scores={"exact_match": score},
                    tokens_evicted=0.0 if cell == "full" else 10.0,
                    info={"length": length, "depth": (number % 4) / 4},
                )
            )
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    known = {"metric_low": 0.0, "metric_high": 1.0, "binary": True, "sources": 20}
    write(tmp_path, [row("full", 1.0, None, n=20, cell="full", **known), row("mix", 0.65, n=20, **known)])
    return tmp_path


def test_rows_by_length(folder: Path) -> None:
    (run,) = read_runs([folder])
    rows = split_by(run, "length").rows
    assert [(item.task, item.method, item.n, item.score) for item in rows] == [
        ("needle, length 1000", "full", 12, 1.0),
        ("needle, length 1000", "mix", 12, 1.0),
        ("needle, length 4000", "full", 8, 1.0),
        ("needle, length 4000", "mix", 8, 0.125),
    ]
    assert (rows[3].score_low, rows[3].score_high) == pytest.approx(mean_interval([1.0] + [0.0] * 7))
    assert rows[3].difference == -0.875
    assert rows[3].p_adjusted is not None
    assert rows[3].p_adjusted < 0.05
    assert rows[1].p_adjusted == 1.0
    assert rows[3].score_full == 1.0
    assert [item.n for item in split_by(run, "depth").rows] == [5] * 8


def test_the_report_by_a_fact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["report", str(folder), *arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    assert "needle, length 4000, exact_match" in said("--by", "length")
    lines = list(csv.DictReader(io.StringIO(said("--by", "depth", "--format", "csv"))))
    assert [item["task"] for item in lines][::2] == [f"needle, depth {depth}" for depth in ("0", "0.25", "0.5", "0.75")]
    assert "**needle, length 1000, exact_match" in said("--by", "length", "--format", "markdown")


def test_a_fact_that_no_document_says(folder: Path) -> None:
    (run,) = read_runs([folder])
    with pytest.raises(UserError, match=r"no document says its lenght: did you mean length\?"):
        split_by(run, "lenght")


def test_rows_of_an_older_file_are_not_split(folder: Path) -> None:
    write(folder, [row("full", 1.0, None, n=20, cell="full"), row("mix", 0.65, n=20)])
    (run,) = read_runs([folder])
    with pytest.raises(UserError, match=r"is of an older suite .* lie: the run's own command writes the file anew"):
        split_by(run, "length")


def test_a_map_over_what_documents_differ_in(folder: Path) -> None:
    (run,) = read_runs([folder])
    samples = list(run.samples.whole(run.samples.values()))
    (figure,) = fact_figures("needle", run.rows, samples)
    assert figure.name == "needle-depth-length"
    # A panel for each cell, all on one scale.
    *panels, _scale = figure.canvas.axes
    assert [axes.get_title() for axes in panels] == ["full", "mix int8 512"]
    colours = {axes: {patch.get_gid(): patch.get_facecolor() for patch in axes.patches} for axes in panels}
    assert colours[panels[0]]["tip-0-0-0"] == colours[panels[1]]["tip-1-0-0"] != colours[panels[1]]["tip-1-1-0"]
    assert len(figure.tips) == 2 * 4 * 2
    assert figure.tips["tip-1-1-0"].startswith("mix int8 512, 0, 4000: exact_match ")
    assert figure.inline_svg().count("<title>") == len(figure.tips)
    # One length is no axis: then each cell is a row.
    (figure,) = fact_figures("needle", run.rows, [item for item in samples if item.info["length"] == 1000])
    assert figure.name == "needle-depth"
    assert [label.get_text() for label in figure.canvas.axes[0].get_yticklabels()] == ["full", "mix int8 512"]
    assert fact_figures("needle", run.rows, [item for item in samples if item.info == samples[0].info]) == []


def test_a_map_over_the_tasks_of_a_group(folder: Path) -> None:
    (run,) = read_runs([folder])
    samples = list(run.samples.whole(run.samples.values()))
    assert task_figure("group", run.rows, samples) is None
    for number, item in enumerate(samples):
        item.task = ("one", "two")[number % 2]
    figure = task_figure("group", run.rows, samples)
    assert figure is not None
    assert [label.get_text() for label in figure.canvas.axes[0].get_yticklabels()] == ["one", "two"]
