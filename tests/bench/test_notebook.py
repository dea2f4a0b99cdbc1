"""The notebook runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CELLS = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, **parameters: Any) -> dict[str, Any]:
    """The cells in one namespace, as a notebook runs them; ``parameters`` replace those of the cell that is tagged."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {}
    for cell in CODE:
        exec(compile("".join(cell["source"]), f"notebook, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(parameters) <= set(names)
            names |= parameters
    return names


def test_no_outputs_are_kept() -> None:
    assert CODE
    for cell in CODE:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_with_a_tiny_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(monkeypatch, tmp_path, MODEL=str(tiny_folder), LENGTH=300, SAMPLES=2, BUDGETS=[0.5, 0.25])
    assert set(names["rows"]["method"]) == {"full", "window", "origin", "mix"}
    assert len(names["found"]) == 2 * 7
    assert "needle (question after), exact_match" in names["results"]._repr_html_()


@pytest.mark.slow
def test_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(monkeypatch, tmp_path)
    full = names["passkeys"].query("method == 'full'")
    assert full["score"].item() == 1
    assert (tmp_path / "runs" / "notebook" / "record.json").is_file()
