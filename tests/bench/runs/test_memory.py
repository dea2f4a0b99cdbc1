"""The command itself on a large folder, with torch and a model: what it takes in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.names import DOCUMENTS, SAMPLES
from bench.runs.documents import prompt_hash
from tasks.base import Document, Generate
from tests.bench.conftest import quiet_environment, read_lines
from tests.conftest import ROOT

MEGABYTES = 500
DOCUMENTS_ASKED, TOKENS, OPEN = 20_000, 200, 20

PLUGIN = """
from tasks.base import Metric, Task
from tests.bench.runs.test_memory import documents


class Long(Task):
    name, metrics = "long", (Metric(name="exact_match", low=0.0, high=1.0),)

    def load(self, settings):
        return documents(settings.limit)

    def score(self, document, answer):
        return {"exact_match": float(sum(map(ord, answer.text + document.id)) % 7 > 1)}
"""

COMMAND = """
import sys
from pathlib import Path
from bench.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    # Not getrusage, which counts the process that has started this one too.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    print()
    print(ended.code, peak // 1000)
"""


def documents(limit: int | None) -> list[Document]:
    """Prompts that all differ."""
    return [
        Document(
            id=f"d{number}",
            request=Generate(
                prompt_ids=tuple((number + 7 * place + number // 250 * place) % 250 for place in range(TOKENS)),
                max_new_tokens=8,
            ),
        )
        for number in range(limit or DOCUMENTS_ASKED)
    ]


def peak(*arguments: object) -> int:
    """Of the command, in MB."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = quiet_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    code, megabytes = done.stdout.split()[-2:]
    assert code in ("0", "None"), done.stdout
    return int(megabytes)


def answered(lines: list[dict[str, Any]], document: Document, number: int) -> list[dict[str, Any]]:
    """The lines of another document, as all cells would have answered it."""
    found = []
    for cell, line in enumerate(lines):
        score = float((number * 7 + cell * 3 + number // 5) % 7 > 1)
        more = {"document": document.id, "prompt_sha256": prompt_hash(document)}
        found.append({**line, **more, "score": score, "scores": {"exact_match": score}})
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_a_run_of_a_hundred_thousand_answers_is_continued_within_500_mb(tiny_folder: Path, tmp_path: Path) -> None:
    """Torch and a model that answers the last documents included."""
    plugin, folder = tmp_path / "long.py", tmp_path / "run"
    plugin.write_text(PLUGIN)
    asked = ["--model", tiny_folder, "--dtype", "float32", "--device", "cpu", "--plugin", plugin, "--tasks", "long"]
    asked += ["--methods", "full,origin,quant,mix,window", "--cache-ratio", "0.25", "--outdir", folder]
    peak("run", *asked, "--limit", 1)
    lines, (prompt,) = read_lines(folder / SAMPLES), read_lines(folder / DOCUMENTS)
    everything = documents(None)
    with open(folder / SAMPLES, "a", encoding="utf-8") as samples, open(folder / DOCUMENTS, "a") as prompts:
        for number, document in enumerate(everything[1:-OPEN], start=1):
            for line in answered(lines, document, number):
                samples.write(json.dumps(line) + "\n")
            prompts.write(
                json.dumps({**prompt, "document": document.id, "prompt_sha256": prompt_hash(document)}) + "\n"
            )
    assert peak("run", *asked) <= MEGABYTES
    assert len(read_lines(folder / SAMPLES)) == 5 * DOCUMENTS_ASKED
    assert peak("report", folder, "--format", "csv") <= MEGABYTES
