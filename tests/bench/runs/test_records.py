"""The run folder survives kills, refuses strangers and never mixes two runs."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.errors import UserError
from bench.names import RECORD, RESULTS, SAMPLES
from bench.records.files import text
from bench.records.files.text import write_atomic
from bench.records.record import read_record
from bench.records.sample import NotFinite, make_sample
from bench.records.samples import Samples
from bench.runs.folder import RunFolder
from bench.runs.run import execute
from bench.settings.run import RunConfig
from tests.bench.conftest import define_toys, read_lines
from tests.bench.lines import line, sample

ROOT = Path(__file__).resolve().parents[3]
ONE, TWO = {"seed": 0}, {"seed": 1}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    write_atomic(file, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(text.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_torn_last_line_is_cut_and_measured_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path, ONE) as folder:
        folder.append(sample("a"))
        folder.append(sample("b", text="ä\n"))
    file = tmp_path / SAMPLES
    whole = file.read_bytes()
    for torn in (whole[:-1], whole[:-9], whole + b'{"model": "m", "ta'):
        file.write_bytes(torn)
        with RunFolder(tmp_path, ONE) as folder:
            expected = {"a", "b"} if torn.startswith(whole) else {"a"}
            assert {key[2] for key in folder.samples} == expected
            folder.append(sample("c"))
        assert {line["document"] for line in read_lines(file)} == {*expected, "c"}


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / SAMPLES
    file.write_text(f"{json.dumps(line('a'))}\nnonsense\n{json.dumps(line('b'))}\n")
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        Samples(file)


def test_no_number_is_written_as_nan(tmp_path: Path) -> None:
    with RunFolder(tmp_path, ONE) as folder, pytest.raises(NotFinite, match="not finite"):
        folder.append(make_sample(**line("a", score=float("nan"))))
    assert not Samples(tmp_path / SAMPLES)


HOLD = """
import sys, time
from bench.runs.folder import RunFolder
with RunFolder(__import__("pathlib").Path(sys.argv[1]), {"seed": 0}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_holds_while_its_process_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        (tmp_path / SAMPLES).write_text(json.dumps(line("theirs")) + "\n")
        for fresh in (False, True):
            with pytest.raises(UserError, match="another run writes here"), RunFolder(tmp_path, ONE, fresh=fresh):
                pass
        assert Samples(tmp_path / SAMPLES), "--fresh must not touch the folder of a living run"
    finally:
        holder.kill()
        holder.wait()
    with RunFolder(tmp_path, ONE) as folder:
        assert len(folder.samples) == 1


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path, ONE) as folder:
        folder.append(sample("a"))
        folder.write_record({"finished": None})
    with pytest.raises(
        UserError, match="other settings: seed is 0 there and 1 here; give another --outdir, or --fresh"
    ):
        RunFolder(tmp_path, TWO).__enter__()
    # The refusal has let go of the lock.
    with RunFolder(tmp_path, ONE) as folder:
        assert len(folder.samples) == 1
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(tmp_path, TWO, fresh=True) as folder:
        assert not folder.samples
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_and_missing_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text("[]")
    with pytest.raises(UserError, match="not the record of a run"):
        RunFolder(tmp_path, ONE).__enter__()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        RunFolder(tmp_path / "file" / "run", ONE).__enter__()


TIMES = {"prefill_s", "compress_s", "ttft_ms", "decode_tokens_per_s", "tpot_ms", "peak_memory_bytes"}


def untimed(folder: Path) -> list[dict[str, str]]:
    """Rows of the table without what a clock or the machine says."""
    with open(folder / RESULTS, newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_kill_9_in_the_middle_and_continue(tmp_path: Path, tiny: Any) -> None:
    """Every document is answered exactly once by every cell, whatever moment the first process died at, and the table
    is that of a run that nobody disturbed."""
    tasks, data = define_toys(tmp_path / "toys")
    settings = {
        "model": (str(tiny.folder),),
        "device": "cpu",
        "tasks": ("toys", "needle"),
        "include_path": (str(tasks),),
        "lengths": (300,),
        "samples": 20,
        "quant_format": ("int8",),
        "quant_type": ("full", "mix"),
        "cache_size": (64,),
    }
    config = RunConfig(**settings, data_dir=data)
    folder, file = tmp_path / "run", tmp_path / "run" / SAMPLES
    # A process of its own: a fork would inherit locks that threads of this one may hold.
    code = (
        "import io, pathlib; from rich.console import Console; from bench.settings.run import RunConfig; "
        "from bench.runs.run import execute; "
        f"config = RunConfig(**{settings!r}, data_dir=pathlib.Path({str(data)!r})); "
        f"execute(config, pathlib.Path({str(folder)!r}), Console(file=io.StringIO()))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 240
        while not (file.is_file() and file.read_bytes().count(b"\n") >= 11):
            assert time.monotonic() < deadline
            assert child.poll() is None, "the run ended by itself"
            time.sleep(0.002)
    finally:
        child.kill()
        child.wait()
    before = file.read_bytes().count(b"\n")
    assert 11 <= before < 60, "killed too late to say anything"
    assert read_record(folder).finished is None

    said = io.StringIO()
    outcome = execute(config, folder, Console(file=said, width=200))
    assert outcome.measured == 60 - before
    assert "answers are in" in said.getvalue()
    lines = read_lines(file)
    keys = [(line["document"], line["cell"]) for line in lines]
    assert len(keys) == len(set(keys)) == 60
    record = read_record(folder)
    assert record.finished
    assert len(record.continued) == 1
    assert record.continued[0].started >= (record.started or "")

    execute(config, tmp_path / "undisturbed", Console(file=io.StringIO()))
    assert untimed(folder) == untimed(tmp_path / "undisturbed")
    behind = {f"{name} (question after)" for name in ("toys", "toy_east", "toy_west", "needle")}
    assert {row["task"] for row in untimed(folder)} == {"toy_text", *behind}
