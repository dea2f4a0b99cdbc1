"""scripts/grid_cost.py on a tiny model: what is counted, not how fast it is."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import save_tiny_model
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("grid_cost", ROOT / "scripts" / "grid_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_grid_is_timed_beside_each_of_its_cells(script: Any, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    options = ["--quant-type", "full,window,mix", "--cache-ratio", "0.5,0.25", "--context-length", "200"]
    options += ["--new-tokens", "3", "--prompts", "2", "--dtype", "float32", "--device", "cpu", "--window-size", "8"]
    script.main([*options, "--model", str(model), "--outdir", str(tmp_path / "out")])
    with open(tmp_path / "out" / "grid_cost.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # For each prompt the grid's clock, its five cells, and each of these alone.
    assert len(rows) == 2 * (1 + 5 + 5)
    assert [row["runs"] for row in rows[:6]] == ["grid"] * 6
    assert rows[11]["runs"] == "single", "the order changes from prompt to prompt"
    shared = {row["prefill_s"] for row in rows[1:6]}
    assert len(shared) == 1
    whole, single = (
        sum(float(row["engine_s"] or 0) for row in rows if row["runs"] == runs) for runs in ("grid", "single")
    )
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["result"]["ratio"] == pytest.approx(whole / single)
    assert len(record["cells"]) == 5
    assert record["settings"]["context_length"] == 200


def test_full_is_counted_once_per_budget_only_where_it_says_so(script: Any) -> None:
    rows = [
        {"runs": "grid", "method": None, "engine_s": 3.0},
        {"runs": "grid", "method": "mix", "engine_s": None},
        {"runs": "single", "method": "full", "engine_s": 2.0},
        {"runs": "single", "method": "mix", "engine_s": 4.0},
    ]
    found = script.summarize(rows, budgets=3)
    assert (found["grid_s"], found["single_s"], found["ratio"]) == (3.0, 6.0, 0.5)
    assert found["ratio_with_full_at_every_budget"] == 0.3


def test_what_cannot_be_is_one_line(script: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^grid_cost.py: unknown method 'mixx': did you mean mix"):
        script.main(["--quant-type", "mixx", "--outdir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
