"""What older runs have left is read, and written again as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.judge.curve import curve_rows
from bench.names import CURVE, RECORD, RESULTS, SAMPLES, SPEED
from bench.records.files.csv_ import csv_text
from bench.records.finished import read_runs
from bench.records.record import read_record, record_text
from bench.records.row import COLUMNS, STATISTICS, read_results, rows_csv
from bench.records.sample import LINE, sample_line
from bench.records.samples import Samples
from bench.records.timing import read_speed_record, read_timings
from bench.records.version import FORMAT_VERSION
from bench.runs.folder import RunFolder
from tests.bench.conftest import quiet_environment, read_lines
from tests.bench.lines import line, sample
from tests.conftest import ROOT

RUNS = sorted(path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob(SAMPLES))
TIMINGS = sorted(path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob(SPEED))


def test_there_are_runs() -> None:
    assert RUNS
    assert TIMINGS


@pytest.mark.parametrize("name", RUNS)
def test_every_run_of_the_repository_is_read(name: str) -> None:
    folder = ROOT / name
    samples = Samples(folder / SAMPLES)
    assert [json.loads(sample_line(item)) for item in samples.whole(samples.values())] == [
        {key: item.get(key) for key in LINE} for item in read_lines(folder / SAMPLES)
    ]
    table = (folder / RESULTS).read_text()
    # Columns that came later are unknown.
    assert csv_text(table.partition("\n")[0].split(","), read_results(folder)) == table
    before = json.loads((folder / RECORD).read_text())
    assert json.loads(record_text(read_record(folder))) == {**before, "format_version": FORMAT_VERSION}
    (run,) = read_runs([folder])
    assert run.rows
    if (folder / CURVE).is_file() and any(item.kind == "compared" for item in samples.values()):
        points = curve_rows(samples.whole(samples.values()))
        assert csv_text(list(type(points[0]).model_fields), points) == (folder / CURVE).read_text()


@pytest.mark.parametrize("name", TIMINGS)
def test_every_timing_of_the_repository_is_read(name: str) -> None:
    folder = ROOT / name
    table = (folder / SPEED).read_text()
    # Columns that came later are unknown.
    assert csv_text(table.partition("\n")[0].split(","), read_timings(folder / SPEED), digits=None) == table
    assert read_speed_record(folder).model.name == ("qwen2.5-coder-0.5b" if folder.name == "exam" else "smollm2-135m")


def test_the_columns_are_those_that_were_promised() -> None:
    assert COLUMNS[:3] == ["model", "task", "metric"]
    assert COLUMNS[-2:] == ["cell", "part_of"]
    assert (STATISTICS[0], STATISTICS[-1]) == ("score_low", "leading")


def test_the_last_line_of_a_question_counts(tmp_path: Path) -> None:
    lines = [line("a", score=0.0), line("b"), line("a", text="later")]
    (tmp_path / SAMPLES).write_text("".join(json.dumps(item) + "\n" for item in lines))
    samples = Samples(tmp_path / SAMPLES)
    assert {item.document: item.text for item in samples.whole(samples.values())} == {"a": "later", "b": "an answer"}


def test_an_answer_is_read_where_it_was_written(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}) as folder:
        for name in ("ä", "b", "c"):
            folder.append(sample(name, text=f"answer of {name}"))
        (found,) = folder.samples.whole([folder.samples[sample("b").key]])
        assert found.text == "answer of b"
    with RunFolder(tmp_path, {}) as folder:
        folder.append(sample("d", text="answer of d"))
        texts = [item.text for item in folder.samples.whole(folder.samples.values())]
    assert texts == [f"answer of {name}" for name in ("ä", "b", "c", "d")]


def test_no_name_moves_the_cursor() -> None:
    assert rows_csv([]) == ",".join(COLUMNS) + "\n"


# --- A large run ---

ANSWERS = 100_000
MEGABYTES = 500

CONTINUE = """
import json, sys
from pathlib import Path
from bench.runs.folder import RunFolder
from bench.runs.results import TaskResults, rows
from tasks.base import Answer, Document, Generate, Metric, Task


class Long(Task):
    name, metrics = "t", (Metric(name="exact_match", low=0.0, high=1.0),)

    def load(self, settings):
        return [Document(id=f"d{i}", request=Generate(prompt_ids=(1,), max_new_tokens=1)) for i in range(20_000)]

    def score(self, document: Document, answer: Answer):
        return {"exact_match": float(int(answer.text.split()[1]) % 7 > 1)}


class Made:
    def __init__(self, key):
        self.key = self.method = self.label = key
        self.quant_format = self.budget_unit = self.cache_size = self.cache_ratio = self.window_size = None


task, cells = Long(), list(map(Made, ("full", "origin", "quant", "mix", "window")))
with RunFolder(Path(sys.argv[1]), {}) as folder:
    documents = task.load(None)
    stored = folder.samples
    assert len(stored) == 100_000
    found = {cell.key: {} for cell in cells}
    for item in stored.values():
        found[item.cell][item.document] = item
    table = rows("m", TaskResults(task, documents, cells, found, stored), cells)
    assert [row.n for row in table] == [20_000] * 5
    assert all(row.p_adjusted is not None for row in table[1:])
    folder.write_results(table)
    folder.write_record({"finished": "now", "started": "then"})
print(json.dumps(peak_mb()))
"""

REPORT = """
import json, sys
from bench.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print()
    print(json.dumps([ended.code, peak_mb()]))
"""


PEAK = """
from pathlib import Path
def peak_mb():
    # Not getrusage, which counts the process that has started this one too.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024
"""


def peak(code: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", PEAK + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_a_hundred_thousand_answers_are_continued_and_reported_within_500_mb(tmp_path: Path) -> None:
    """With the statistics of 20,000 documents; torch and a model come on top."""
    text = "answer {} " + "of many words " * 40
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / SAMPLES, "w", encoding="utf-8") as file:
        for number in range(ANSWERS):
            answer = {"text": text.format(number), "token_ids": list(range(100)), "oq_ratios": [0.5] * 30}
            score = float(number % 7 > 1)
            answer |= {"score": score, "scores": {"exact_match": score}}
            cell = ("full", "origin", "quant", "mix", "window")[number % 5]
            if cell != "full":
                answer |= {"tokens_original": 50.0, "tokens_evicted": 51.0, "kv_bytes": 500}
            file.write(json.dumps(line(f"d{number // 5}", cell, **answer)) + "\n")
    continued = peak(CONTINUE, folder)
    assert continued <= MEGABYTES
    for options in (["--format", "csv"], ["--html", tmp_path / "page.html"]):
        code, reported = peak(REPORT, "report", folder, *options)
        assert code == 0
        assert reported <= MEGABYTES
