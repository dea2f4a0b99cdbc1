"""A run over lm-eval's tasks that is killed, and the same command again."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.names import RESULTS, SAMPLES
from tests.bench.conftest import define_toys, quiet_environment, read_lines, save_tiny_model
from tests.conftest import ROOT

TIMES = {"prefill_s", "compress_s", "ttft_ms", "decode_tokens_per_s", "tpot_ms"}

RUN = "from bench.cli import main; main()"

KILLED = f"""
import os, signal, sys
from bench.runs.folder import RunFolder

left = int(sys.argv.pop(1))
append = RunFolder.append

def append_and_die(self, sample):
    global left
    append(self, sample)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.append = append_and_die
{RUN}
"""
"""The command line, killed once it has written as many samples as its first argument says."""


def start(code: str, *arguments: str, returns: int = 0) -> None:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == returns, done.stdout + done.stderr


def keys(path: Path) -> list[tuple[str, str, str]]:
    return [(line["task"], line["document"], line["cell"]) for line in read_lines(path / SAMPLES)]


def table(path: Path) -> list[dict[str, str]]:
    """Rows of the table without the columns that are times."""
    with open(path / RESULTS, encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_killed_exam_goes_on_to_the_same_table(tmp_path: Path) -> None:
    """Questions behind their contexts, rows of each length and the average, and presses that share a prefill."""
    if find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed")
    model = save_tiny_model(tmp_path / "tiny", context=2048)
    command = [
        *["run", "--model", str(model), "--tasks", "ruler:vt,fwe", "--lengths", "1500,1800", "--samples", "1"],
        *["--methods", "full,mix,kvpress:snapkv,kvpress:kvzip", "--cache-ratio", "0.25", "--question", "after"],
        *["--device", "cpu", "--dtype", "float32", "--outdir"],
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(RUN, *command, str(whole))
    assert len(keys(whole)) == 4 * 4
    # Within the answers to one question, between those of two presses.
    start(KILLED, "7", *command, str(broken), returns=-signal.SIGKILL)
    assert len(keys(broken)) == 7
    start(RUN, *command, str(broken))
    assert sorted(keys(broken)) == sorted(keys(whole))
    assert table(broken) == table(whole)
    assert {row["question"] for row in table(whole)} == {"after"}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_table(tiny_folder: Path, tmp_path: Path) -> None:
    """Killed between two documents' answers, within the answers of one, and with its last line half written."""
    tasks, data = define_toys(tmp_path / "toys")
    sums = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(10, 16)]
    for split in ("test", "train"):
        path = data / f"gsm8k/{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    command = [
        *["run", "--model", str(tiny_folder), "--tasks", "gsm8k,toys", "--include-path", str(tasks)],
        *["--data-dir", str(data), "--quant-type", "full,origin,mix", "--cache-ratio", "0.25", "--window-size", "8"],
        *["--quant-format", "int8", "--gen-kwargs", "max_gen_toks=6"],
        *["--device", "cpu", "--dtype", "float32", "--outdir"],
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(RUN, *command, str(whole))
    # 3 cells each: 6 generations, 3 + 5 questions of two choices, 2 texts.
    assert len(keys(whole)) == len(set(keys(whole))) == 3 * (6 + 8 + 2)

    start(KILLED, "7", *command, str(broken), returns=-signal.SIGKILL)
    assert len(keys(broken)) == 7
    start(KILLED, "18", *command, str(broken), returns=-signal.SIGKILL)
    samples = broken / SAMPLES
    samples.write_bytes(samples.read_bytes()[:-30])
    assert len(samples.read_bytes().splitlines()) == 25
    start(RUN, *command, str(broken))
    assert sorted(keys(broken)) == sorted(keys(whole))
    assert table(broken) == table(whole)
    assert len({row["task"] for row in table(whole)}) == 5
