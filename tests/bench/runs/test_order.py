"""The order of cells: none is always first, answers stay the same, and a continued run goes on as it would have."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import bench.runs.run as runs
from bench.engine.engine import AUTO_DOCUMENTS
from bench.names import RECORD, SAMPLES
from bench.runs.order import turned
from tests.bench.conftest import TIMES, read_lines
from tests.bench.runs.test_run import go


def test_every_cell_stands_at_every_place_equally_often() -> None:
    cells = ["full", "origin", "quant", "mix"]
    for at_once in (1, 3, 8):
        places = Counter(
            (cell, at) for batch in range(8) for at, cell in enumerate(turned(cells, batch * at_once, at_once))
        )
        assert set(places.values()) == {2}
        assert len(places) == 16
    # A batch has one order; automatic ones begin with each cell in turn.
    assert turned(cells, 3, 3) == turned(cells, 5, 3)
    assert {turned(cells, unit * AUTO_DOCUMENTS, None)[0] for unit in range(4)} == set(cells)
    assert turned([], 3, 1) == []


def order(path: Path) -> dict[str, list[str]]:
    """Methods by document, in the order of the lines."""
    found: dict[str, list[str]] = {}
    for line in read_lines(path / SAMPLES):
        found.setdefault(line["document"], []).append(line["method"])
    return found


def untimed(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    kept = ({name: value for name, value in line.items() if name not in TIMES} for line in read_lines(path / SAMPLES))
    return {(line["document"], line["cell"]): line for line in kept}


def test_a_run_turns_the_order_and_says_so(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tiny_folder, tmp_path / "turned")
    assert list(order(tmp_path / "turned").values()) == [
        ["full", "window", "mix"],
        ["window", "mix", "full"],
        ["mix", "full", "window"],
    ]
    record = json.loads((tmp_path / "turned" / RECORD).read_text())
    assert record["starts"][-1]["cell_order"] == "turned by one place from document to document"
    assert record["models"]["tiny"]["warm_up"] == "a prompt of 256 tokens through every cell, budgets of 128"
    # Stopped in the midst of a document, and continued.
    stopped = tmp_path / "stopped"
    go(tiny_folder, stopped)
    lines = (stopped / SAMPLES).read_text().splitlines(keepends=True)
    (stopped / SAMPLES).write_text("".join(lines[:5]))
    go(tiny_folder, stopped)
    assert order(stopped) == order(tmp_path / "turned")
    # The order changes no answer.
    monkeypatch.setattr(runs, "turned", lambda cells, place, at_once: list(cells))
    go(tiny_folder, tmp_path / "fixed")
    assert set(map(tuple, order(tmp_path / "fixed").values())) == {("full", "window", "mix")}
    assert untimed(tmp_path / "fixed") == untimed(tmp_path / "turned")
