"""Runs of the command line that are killed, interrupted, or short of disk or memory: in the end every sample is there
once, and the table is that of a run that nobody disturbed."""

from __future__ import annotations

import csv
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from bench.cli import main
from bench.methods.presses import library
from bench.names import CURVE, SAMPLES
from tests.bench.conftest import SENTENCES, quiet_environment, read_lines
from tests.bench.lines import recorded
from tests.bench.runs.test_records import untimed
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

PLUGIN = """
import os
import torch
from bench.extend import Method, keep_tokens


class Moody(Method):
    name = "moody"

    def compress(self, model, prompt, budget):
        if os.environ.get("FAULTY") and prompt.tokens % 2:
            raise LookupError("not today")
        return keep_tokens(prompt, [torch.arange(budget.tokens) for _ in prompt.layers])


class Hungry(Moody):
    name = "hungry"

    def compress(self, model, prompt, budget):
        if os.environ.get("FAULTY"):
            torch.empty(1 << 56)
        return super().compress(model, prompt, budget)
"""
METHODS = ["full", "mix", "kvpress:snapkv", "moody", "hungry"]
DOCUMENTS = 4 + 4


@pytest.fixture(scope="module")
def options(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, without the run folder."""
    folder = tmp_path_factory.mktemp("given")
    plugin, text = folder / "moody.py", folder / "text.txt"
    plugin.write_text(PLUGIN)
    text.write_text(" ".join(SENTENCES * 20))
    # Imported once, for all forks.
    library("kvpress:snapkv")
    for module in ("bench.runs.run", "bench.report.averages"):
        importlib.import_module(module)
    return [
        *["run", "--model", str(tiny_folder), "--device", "cpu", "--dtype", "float32"],
        *["--tasks", "needle,fidelity", "--lengths", "301", "--samples", "4"],
        *["--text", str(text), "--continuation", "12"],
        *["--quant-type", ",".join(METHODS), "--cache-ratio", "0.25", "--plugin", str(plugin)],
    ]


class Run:
    """The command line in a process of its own: a fork, since a new interpreter would import for many seconds."""

    def __init__(self, options: list[str], folder: Path, prepare: Callable[[], None] = lambda: None) -> None:
        self.said = ""
        """What it said, known when it has ended."""
        # A pipe: no full disk and no limit of files is met by it, and what is said fits its buffer.
        self._output, output = os.pipe()
        # Nothing of this process may be written twice.
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if not self.process:
            self._be(options, folder, prepare, output)
        os.close(output)

    def _be(self, options: list[str], folder: Path, prepare: Callable[[], None], output: int) -> NoReturn:
        code = 99
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            prepare()
            main([*options, "--outdir", str(folder)])
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        with open(self._output, encoding="utf-8") as output:
            self.said = output.read()
        return code

    def signal_at(self, file: Path, size: int, delay: float, number: int) -> bool:
        """Send a signal soon after ``file`` has so many bytes; False where the run ended before."""
        deadline = time.monotonic() + 120
        while not (file.is_file() and file.stat().st_size >= size):
            assert time.monotonic() < deadline
            if os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(self.process, number)
        return True


def complete(folder: Path) -> None:
    """Every sample is there, once, and nothing else is left behind."""
    samples = read_lines(folder / SAMPLES)
    keys = [(sample["task"], sample["document"], sample["cell"]) for sample in samples]
    assert len(keys) == len(set(keys)) == DOCUMENTS * len(METHODS)
    record = recorded(folder)
    assert record["finished"]
    assert record["failures"] == []
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []


def curve(folder: Path) -> list[dict[str, str]]:
    with open(folder / CURVE, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    started = Run(options, folder)
    assert started.wait() == 0, started.said
    complete(folder)
    return folder


@pytest.fixture
def check(options: list[str], undisturbed: Path) -> Callable[[Path], None]:
    """The same command finishes the run, whose table is that of the undisturbed one."""

    def same(folder: Path) -> None:
        started = Run(options, folder)
        assert started.wait() == 0, started.said
        complete(folder)
        assert untimed(folder) == untimed(undisturbed)
        assert curve(folder) == curve(undisturbed)

    return same


def test_kill_9_at_five_moments(
    options: list[str], undisturbed: Path, tmp_path: Path, check: Callable[[Path], None]
) -> None:
    drawn = random.Random(6)
    folder, file = tmp_path / "run", tmp_path / "run" / SAMPLES
    whole = (undisturbed / SAMPLES).stat().st_size
    # The first one before anything has been measured.
    for size in [0, *sorted(drawn.randrange(whole * 9 // 10) for _ in range(4))]:
        # Answers of documents that went together may have outgrown it: then one more is waited for.
        size = max(size, file.stat().st_size + 1) if file.is_file() else size
        started = Run(options, folder)
        assert started.signal_at(file, size, drawn.random() / 50, signal.SIGKILL), "the run ended before it was killed"
        assert started.wait() == -signal.SIGKILL
        assert (folder / ".lock").is_file(), "the lock of a dead process must not matter, and here is one"
    check(folder)
    assert len(recorded(folder)["continued"]) in (4, 5), "the first may have died before it wrote its record"


def ended_with_one_line(started: Run, folder: Path, said: str) -> None:
    assert "Traceback" not in started.said
    last = [line for line in started.said.splitlines() if line.startswith("arkv-bench:")]
    assert last == [f"arkv-bench: stopped: {said}; free some: the same command with --outdir {folder} continues"]


def test_files_that_cannot_grow(
    options: list[str], undisturbed: Path, tmp_path: Path, check: Callable[[Path], None]
) -> None:
    import resource

    folder = tmp_path / "run"
    whole = (undisturbed / SAMPLES).stat().st_size
    for limit in (100, whole // 3, whole * 2 // 3 + 17):
        started = Run(
            options,
            folder,
            lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # type: ignore[misc]
        )
        assert started.wait() == 1
        ended_with_one_line(started, folder, "File too large")
    check(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few kilobytes, for those who may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(options: list[str], small_disk: Path, check: Callable[[Path], None]) -> None:
    folder = small_disk / "run"
    said = "No space left on device"
    for _ in range(2):
        started = Run(options, folder)
        assert started.wait() == 1
        ended_with_one_line(started, folder, said)
    assert recorded(folder)["finished"] is None
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    check(folder)


def test_a_cell_that_raises_and_one_without_memory(
    options: list[str], tmp_path: Path, check: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    started = Run(options, folder, lambda: os.environ.update(FAULTY="yes"))
    assert started.wait() == 1
    failures = recorded(folder)["failures"]
    failed = {(item["task"], item["cell"].partition("-")[0]): item["error"] for item in failures}
    needle = "needle (question after)"
    assert set(failed) == {(needle, "hungry"), ("fidelity", "hungry"), (needle, "moody")} | (
        {("fidelity", "moody")} & set(failed)
    )
    assert failed[needle, "moody"].startswith("moody: LookupError: not today (moody.py, line ")
    assert "allocate" in failed["fidelity", "hungry"]
    assert "Traceback" not in started.said
    assert "moody: LookupError: not today" in started.said
    done = {sample["method"] for sample in read_lines(folder / SAMPLES)}
    assert {"full", "mix", "kvpress:snapkv"} <= done
    assert "hungry" not in done
    check(folder)


def test_ctrl_c(options: list[str], undisturbed: Path, tmp_path: Path, check: Callable[[Path], None]) -> None:
    """In an interpreter of its own, as from a shell."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "bench.cli", *options, "--outdir", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=quiet_environment(), stderr=subprocess.PIPE, text=True) as process:
        while not ((folder / SAMPLES).is_file() and (folder / SAMPLES).stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == (
        f"arkv-bench: stopped; what was measured is in {folder}: the same command with --outdir {folder} continues\n"
    )
    check(folder)
