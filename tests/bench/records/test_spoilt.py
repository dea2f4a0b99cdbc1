"""Files that somebody edited or broke: whoever reads them says so in one line, or can do without."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench.errors import UserError
from bench.gate.comparing import check
from bench.gate.findings import Tolerances
from bench.gate.reading import read
from bench.gate.writing import lines, to_markdown
from bench.names import RECORD, RESULTS, SAMPLES, SPEED, STATES
from bench.records.files.csv_ import csv_text
from bench.records.finished import read_runs
from bench.records.row import read_results
from bench.records.shown import headline
from bench.records.states import MapRecord, StatesMap, write_maps
from bench.report import writing
from bench.report.page import build
from bench.report.terminal import print_comparison
from bench.runs.folder import RunFolder
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few documents with all the files that a folder may have."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    source = ROOT / "results" / "ci"
    for name in (RECORD, RESULTS):
        shutil.copy(source / name, folder / name)
    with open(source / SAMPLES, encoding="utf-8") as file:
        kept = [item for item in file if json.loads(item)["document"] in ("1000-d0.06-0", "fidelity-1000-0")]
    (folder / SAMPLES).write_text("".join(kept))
    shares = [[0.5, 1.0], [0.0, 0.5]]
    states = StatesMap(tokens=10, heads=2, layers=[0, 1], original=shares, quantized=shares)
    where = {"model": "smollm2-135m", "task": "needle", "document": "d", "cell": "full", "label": "full"}
    write_maps(folder, [MapRecord(**where, map=states)])
    return folder


def go_on(folder: Path) -> None:
    """As the run's own command would."""
    fingerprint = json.loads((ROOT / "results" / "ci" / RECORD).read_text())["fingerprint"]
    with RunFolder(folder, fingerprint) as opened:
        list(opened.samples.whole(opened.samples.values()))


def report(folder: Path) -> None:
    rows = read_results(folder)
    print_comparison([headline(rows)], Console(file=io.StringIO(), width=80))
    writing.to_markdown([rows])
    writing.to_latex([rows])
    writing.to_csv({"one": rows, "two": rows})


def gate(folder: Path) -> None:
    for run, baseline in ((folder, ROOT / "results" / "ci"), (ROOT / "results" / "ci", folder)):
        found = check(read(run), read(baseline), Tolerances())
        lines(found)
        to_markdown(found)


def page(folder: Path) -> None:
    build(read_runs([folder]))


READERS: tuple[Callable[[Path], None], ...] = (go_on, report, gate, page)


def told(folder: Path, readers: tuple[Callable[[Path], None], ...] = READERS) -> list[str]:
    """What the readers refuse, each in one line that names a file of the folder."""
    said = []
    for reader in readers:
        try:
            reader(folder)
        except UserError as error:
            said.append(str(error))
    assert all("\n" not in text and str(folder) in text for text in said), said
    return said


def spoilt(whole: Path, path: Path) -> Path:
    shutil.copytree(whole, path, ignore=shutil.ignore_patterns(".lock"))
    return path


def second_line(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = (folder / SAMPLES).read_text().splitlines()
        (folder / SAMPLES).write_text("\n".join([old[0], text, *old[2:]]) + "\n")

    return change


def field(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = [json.loads(item) for item in (folder / SAMPLES).read_text().splitlines()]
        (folder / SAMPLES).write_text("".join(json.dumps(item) + "\n" for item in (old[0], {**old[1], **values})))

    return change


def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps(change(content)))

    return write


def file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (second_line("5"), "samples.jsonl, line 2: 5 is no JSON object"),
        (second_line("{}"), "samples.jsonl, line 2, field 'model': missing"),
        (second_line("[]"), "samples.jsonl, line 2: [] is no JSON object"),
        (second_line('{"model": "m", '), "samples.jsonl, line 2: not valid JSON"),
        (second_line("\x00\x01"), "samples.jsonl, line 2: not valid JSON"),
        (field(kv_bytes="many"), "line 2, field 'kv_bytes': 'many' is no whole number"),
        (field(kv_bytes=-1), "line 2, field 'kv_bytes': -1 is no number that can be"),
        (field(prefill_s=float("nan")), "line 2, field 'prefill_s': nan is no number"),
        (field(scores={"exact_match": float("inf")}), "field 'scores.exact_match': inf is no number"),
        (field(scores=None), "line 2, field 'scores': None is no JSON object"),
        (field(token_ids=[1, "two"]), "line 2, field 'token_ids.1': 'two' is no whole number"),
        (field(text=None), "line 2: text and token_ids belong together"),
        (field(compared={"kl": [1.0]}), "line 2, field 'compared.agrees': missing"),
        (field(oq_ratios=["high"]), "line 2, field 'oq_ratios.0': 'high' is no number"),
        (file(SAMPLES, b"\xff\xfe\n"), "samples.jsonl, line 1: not valid JSON"),
        (file(RECORD, b""), "record.json is not the record of a run: not valid JSON"),
        (file(RECORD, b"\xff\xfe"), "record.json is not the record of a run: not valid JSON"),
        (file(RECORD, b'{"started": "now"}'), "record.json is not the record of a run, field 'fingerprint': missing"),
        (record(lambda old: {"fingerprint": None}), "field 'fingerprint': None is no JSON object"),
        (
            record(lambda old: {**old, "fingerprint": {**old["fingerprint"], "data": [1]}}),
            "field 'fingerprint.data': [1] is no JSON object",
        ),
        (record(lambda old: {**old, "failures": [{"task": "t"}]}), "field 'failures.0.error': missing"),
        (record(lambda old: {**old, "cells": [1]}), "field 'cells': [1] is no JSON object"),
        (
            record(lambda old: {**old, "format_version": 99}),
            "field 'format_version': of another arkv-bench: it has format 99, this one reads 1 to",
        ),
        (file(RESULTS, b"model,task\nm,t\n"), "results.csv: no column 'metric'"),
        (file(RESULTS, b"\xff\xfe\x00"), "results.csv: not a CSV file in UTF-8"),
        (file(STATES, b"{}"), "states.json is not a file of states maps, field 'maps': missing"),
        (file(STATES, b'{"format_version": 99, "maps": []}'), "of another arkv-bench"),
        (file(SPEED, b"method\nfull\n"), "speed.csv: no column 'quant_format'"),
    ],
)
def test_each_is_one_line(whole: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    folder = spoilt(whole, tmp_path / "run")
    spoil(folder)
    assert any(said in text for text in told(folder)), told(folder)


def test_nothing_is_said_of_the_whole(whole: Path, tmp_path: Path) -> None:
    assert told(spoilt(whole, tmp_path / "run")) == []


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
RELAXED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def changed(draw: st.DataObject, content: Any) -> Any:
    """The same with one value in it, at any depth, another one or missing."""
    if not content or not isinstance(content, (dict, list)) or draw.draw(st.integers(0, 3)) == 0:
        return draw.draw(ANYTHING)
    if isinstance(content, dict):
        name = draw.draw(st.sampled_from(sorted(content)))
        if draw.draw(st.integers(0, 4)) == 0:
            return {key: value for key, value in content.items() if key != name}
        return {**content, name: changed(draw, content[name])}
    place = draw.draw(st.integers(0, len(content) - 1))
    return [*content[:place], changed(draw, content[place]), *content[place + 1 :]]


@RELAXED
@given(data=st.data())
def test_no_edit_of_a_sample_ends_in_a_traceback(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = spoilt(whole, tmp_path_factory.mktemp("edited") / "run")
    old = (folder / SAMPLES).read_text().splitlines()
    place = data.draw(st.integers(0, len(old) - 1))
    old[place] = json.dumps(changed(data, json.loads(old[place])))
    (folder / SAMPLES).write_text("\n".join(old) + "\n")
    told(folder, (go_on, gate))


@RELAXED
@given(data=st.data())
def test_no_edit_of_the_record_or_the_maps_does(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = spoilt(whole, tmp_path_factory.mktemp("edited") / "run")
    name = data.draw(st.sampled_from((RECORD, STATES)))
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(changed(data, content)))
    told(folder, (go_on, gate, lambda path: read_runs([path]) and None))


@RELAXED
@given(data=st.data())
def test_no_edit_of_a_table_does(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = spoilt(whole, tmp_path_factory.mktemp("edited") / "run")
    with open(folder / RESULTS, newline="") as handle:
        columns, *rows = csv.reader(handle)
    place = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, len(columns) - 1))
    cells = st.sampled_from(["", "0", "-1", "1e308", "nan", "True", "5.5", "full", "tokens", "99999999999999999999"])
    rows[place[0]][place[1]] = data.draw(cells | st.text(max_size=5).filter(lambda text: "\r" not in text))
    (folder / RESULTS).write_text(csv_text(columns, rows), encoding="utf-8", errors="surrogatepass")
    told(folder, (report, gate))


@settings(RELAXED, max_examples=5)
@given(data=st.data())
def test_no_edit_breaks_the_page(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = spoilt(whole, tmp_path_factory.mktemp("edited") / "run")
    old = (folder / SAMPLES).read_text().splitlines()
    place = data.draw(st.integers(0, len(old) - 1))
    line = json.loads(old[place])
    name = data.draw(st.sampled_from(["oq_ratios", "compared", "truncated", "decode_s", "cell", "document"]))
    old[place] = json.dumps({**line, name: changed(data, line[name])})
    (folder / SAMPLES).write_text("\n".join(old) + "\n")
    told(folder, (page,))
