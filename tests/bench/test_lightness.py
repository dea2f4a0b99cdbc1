"""Commands that only read what is there load neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.conftest import quiet_environment
from tests.bench.lines import line
from tests.conftest import ROOT

CALL = """
import json, sys
from bench.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    heavy = ("torch", "transformers", "lm_eval", "datasets", "pandas", "scipy", "matplotlib")
    loaded = [name for name in heavy if name in sys.modules]
    print(json.dumps({"code": ended.code, "loaded": loaded}), file=sys.stderr)
"""
NEITHER = {"torch", "transformers", "lm_eval", "datasets", "pandas"}


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command, whose last line to stderr is how it ended and what it loaded."""
    command = [sys.executable, "-c", CALL, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=120)


def loaded(*arguments: object) -> set[str]:
    """What of the heavy libraries a command loads, which must do its work."""
    done = called(*arguments)
    said = json.loads(done.stderr.splitlines()[-1])
    assert said["code"] == 0, done.stderr
    return set(said["loaded"])


@pytest.mark.parametrize(
    "arguments",
    [
        *(["report", "results/demo", "--format", name] for name in ("csv", "markdown", "terminal")),
        *(["list", name] for name in ("methods", "tasks", "models", "presets")),
    ],
)
def test_tables_and_lists_need_no_numbers_library(arguments: list[str]) -> None:
    assert loaded(*arguments) == set()


def test_the_gate_needs_statistics_and_the_page_figures(tmp_path: Path) -> None:
    assert loaded("check", "results/ci", "--against", "results/ci") & NEITHER == set()
    page = tmp_path / "page.html"
    assert loaded("report", "results/demo", "results/speed/batch1", "--html", page) & NEITHER == set()
    assert page.is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--methods", "snapkv,windo"], "unknown method 'windo': did you mean window"),
        (["run", "--tasks", "needel"], "unknown task 'needel': did you mean needle"),
        (["run", "--methods", "windo", "--print-config"], "unknown method 'windo': did you mean window"),
        (["run", "--tasks", "needel", "--print-config"], "unknown task 'needel': did you mean needle"),
        (["run", "--model", "./nowhere", "--print-config"], "The model path ./nowhere does not exist"),
        (["speed", "--model", "./nowhere"], "The model path ./nowhere does not exist"),
        (["tune", "--methods", "minx"], "unknown method 'minx': did you mean mix?"),
    ],
)
def test_a_slip_does_not_wait_for_torch(arguments: list[str], said: str) -> None:
    done = called(*arguments)
    ended = json.loads(done.stderr.splitlines()[-1])
    assert said in done.stderr
    assert ended["code"] == 2
    assert set(ended["loaded"]) & NEITHER == set()


def test_a_wrong_path_does_not_wait_for_figures() -> None:
    ended = json.loads(called("view", "nowhere").stderr.splitlines()[-1])
    assert ended == {"code": 2, "loaded": []}


def test_scores_of_predictions(tmp_path: Path) -> None:
    made = {"pred": "Ann", "answers": ["Ann"], "all_classes": None, "length": 5000}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(made) + "\n")
    assert loaded("score", tmp_path) & NEITHER == set()


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from bench.runs.folder import RunFolder\n"
    code += "with RunFolder(Path(sys.argv[1]), {}) as folder: assert len(folder.samples) == 1\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    (tmp_path / "samples.jsonl").write_text(json.dumps(line()) + "\n")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=quiet_environment(), check=True)
