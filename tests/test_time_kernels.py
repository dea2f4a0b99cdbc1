"""scripts/time_kernels.py as far as it goes without a GPU."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arkv.kernels.cpu import building

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("time_kernels", ROOT / "scripts" / "time_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(attention: str, times: list[float], **columns: Any) -> list[dict[str, Any]]:
    shared = {"attention": attention, "quant_format": None, "context_length": 1024, "kv_bytes": 2_500_000}
    return [
        {**shared, "max_error": None, **columns, "repetition": repetition, "ms": ms, "gb_per_second": 1 / ms}
        for repetition, ms in enumerate(times)
    ]


def test_without_a_gpu_one_line_says_so(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^time_kernels.py: no CUDA device$"):
        script.main([])


def test_an_unknown_format_is_named(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--formats", "int8,int5"])
    assert "'int5' is none of fp8, int8, int4, int2, k4v3" in capsys.readouterr().err


def test_table_and_files(script: Any, tmp_path: Path) -> None:
    rows = rows_of("sdpa", [0.4, 0.2, 0.3]) + rows_of("kernel", [0.1], quant_format="int8", max_error=1.2e-6)
    console = Console(width=120, file=io.StringIO())
    console.print(script.summary(rows, 2e10))
    text = console.file.getvalue()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert cells == [
        ["sdpa", "", "1024", "2.5", "0.3000", "0.2000", "0.4000", "3.33", "17%", ""],
        ["kernel", "int8", "1024", "2.5", "0.1000", "0.1000", "0.1000", "10.00", "50%", "1.2e-06"],
    ]

    script.write(tmp_path / "out", rows, script.parse(["--context-lengths", "1024", "--formats", "int8"]), 2e10)
    with open(tmp_path / "out" / "kernels.csv", newline="") as file:
        saved = list(csv.DictReader(file))
    assert [row["ms"] for row in saved] == ["0.4", "0.2", "0.3", "0.1"]
    assert json.loads((tmp_path / "out" / "record.json").read_text())["settings"]["formats"] == ["int8"]


def test_on_a_cpu(script: Any, tmp_path: Path) -> None:
    if building.library() is None:
        pytest.skip("no C compiler")
    small = ["--device", "cpu", "--layers", "2", "--kv-heads", "2", "--group", "3", "--head-dim", "32"]
    script.main(
        [*small, "--context-lengths", "70", "--formats", "k4v3", "--repetitions", "1", "--outdir", str(tmp_path)]
    )
    with open(tmp_path / "kernels.csv", newline="") as file:
        saved = list(csv.DictReader(file))
    assert [(row["attention"], row["quant_format"]) for row in saved] == [
        *[("sdpa", ""), ("kernel", "none"), ("twin", "none"), ("kernel", "k4v3"), ("twin", "k4v3")]
    ]
    assert all(float(row["gb_per_second"]) > 0 for row in saved)
    assert max(float(row["max_error"]) for row in saved if row["attention"] == "kernel") < 0.01
