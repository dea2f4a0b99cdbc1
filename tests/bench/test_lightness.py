"""Commands that only read what is there load neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench.conftest import quiet_environment
from tests.bench.lines import line
from tests.conftest import ROOT

CALLS = """
import json, sys
from bench.cli import main
heavy = ("torch", "transformers", "lm_eval", "datasets", "pandas", "scipy", "matplotlib")
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        loaded = [name for name in heavy if name in sys.modules]
        print(json.dumps({"code": ended.code, "loaded": loaded}), file=sys.stderr)
"""
NEITHER = {"torch", "transformers", "lm_eval", "datasets", "pandas"}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    loaded: set[str]
    """Heavy libraries, also by the commands before it."""
    said: str


def called(*commands: Sequence[object]) -> list[Ended]:
    """Commands, one after the other in one process."""
    arguments = json.dumps([[str(item) for item in command] for command in commands])
    line = [sys.executable, "-c", CALLS, arguments]
    done = subprocess.run(line, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=120)
    found, said = [], ""
    for line_said in done.stderr.splitlines():
        if line_said.startswith('{"code": '):
            ended = json.loads(line_said)
            found.append(Ended(ended["code"], set(ended["loaded"]), said))
            said = ""
        else:
            said += line_said + "\n"
    assert len(found) == len(commands), done.stderr
    return found


def loaded(*commands: Sequence[object]) -> set[str]:
    """What of the heavy libraries commands load, which must do their work."""
    found = called(*commands)
    assert [ended.code for ended in found] == [0] * len(commands), found
    return found[-1].loaded


def test_tables_and_lists_need_no_numbers_library() -> None:
    tables = [["report", "results/demo", "--format", name] for name in ("csv", "markdown", "terminal")]
    lists = [["list", name] for name in ("methods", "tasks", "models", "presets")]
    assert loaded(*tables, *lists) == set()


def test_the_gate_needs_statistics_and_the_page_figures(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    gate = ["check", "results/ci", "--against", "results/ci"]
    assert loaded(gate, ["report", "results/demo", "results/speed/batch1", "--html", page]) & NEITHER == set()
    assert page.is_file()


SLIPS = [
    (["run", "--methods", "snapkv,windo"], "unknown method 'windo': did you mean window"),
    (["run", "--tasks", "needel"], "unknown task 'needel': did you mean needle"),
    (["run", "--methods", "windo", "--print-config"], "unknown method 'windo': did you mean window"),
    (["run", "--tasks", "needel", "--print-config"], "unknown task 'needel': did you mean needle"),
    (["run", "--model", "./nowhere", "--print-config"], "The model path ./nowhere does not exist"),
    (["speed", "--model", "./nowhere"], "The model path ./nowhere does not exist"),
    (["tune", "--methods", "minx"], "unknown method 'minx': did you mean mix?"),
]


def test_a_slip_does_not_wait_for_torch() -> None:
    for (_, said), ended in zip(SLIPS, called(*(arguments for arguments, _ in SLIPS)), strict=True):
        assert said in ended.said
        assert ended.code == 2
        assert ended.loaded & NEITHER == set()


def test_a_wrong_path_does_not_wait_for_figures() -> None:
    (ended,) = called(["view", "nowhere"])
    assert (ended.code, ended.loaded) == (2, set())


def test_scores_of_predictions(tmp_path: Path) -> None:
    made = {"pred": "Ann", "answers": ["Ann"], "all_classes": None, "length": 5000}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(made) + "\n")
    assert loaded(["score", tmp_path]) & NEITHER == set()


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from bench.runs.folder import RunFolder\n"
    code += "with RunFolder(Path(sys.argv[1]), {}) as folder: assert len(folder.samples) == 1\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    (tmp_path / "samples.jsonl").write_text(json.dumps(line()) + "\n")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=quiet_environment(), check=True)
