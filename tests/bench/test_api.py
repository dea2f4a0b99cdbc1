"""The suite from Python: what a call leaves is what the command leaves, and errors are one line."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import bench
from bench import Results, evaluate, load_run
from bench.cli import main
from bench.errors import UserError
from tasks.base import Answer, Document, Generate, Generated, Metric, Task, TaskSettings
from tests.bench.conftest import TIMES, quiet_environment

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"lengths": [250], "samples": 2, "quant_format": "int8", "device": "cpu", "dtype": "float32"}


class Animals(Task):
    """A task of the user's own, given as an object."""

    name = "animals"
    metrics = (Metric(name="exact_match"),)

    def load(self, settings: TaskSettings) -> Sequence[Document]:
        ids = tuple(settings.tokenizer("The old farmer bought a basket of apples. " * 12)["input_ids"])
        asked = Generate(prompt_ids=ids, max_new_tokens=3)
        return [Document(id=str(number), request=asked, reference="apples") for number in range(2)]

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        assert isinstance(answer, Generated)
        return {"exact_match": float(answer.text == document.reference)}


@pytest.fixture(scope="module")
def results(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = tmp_path_factory.mktemp("api") / "run"
    return evaluate(str(tiny_folder), "needle", ["full", "mix"], [64], outdir=path, quiet=True, **SMALL)


def test_importing_the_suite_loads_nothing_heavy() -> None:
    code = "import sys, bench; print([name for name in ('torch', 'pandas', 'transformers') if name in sys.modules])"
    environment = quiet_environment()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
    assert {"evaluate", "load_run", "Results"} <= set(bench.__all__)
    code = """
import sys, bench
results = bench.load_run("results/demo")
assert len(list(results.samples())) == 180 and "mix" in results._repr_html_()
print([name for name in ("torch", "transformers", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="evaluat"):
        _ = bench.evaluat


def test_a_call_leaves_what_the_command_leaves(results: Results, tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--lengths", "250", "--samples", "2", "--quant-format", "int8", "--device", "cpu", "--dtype", "float32"]
    grid = ["--tasks", "needle", "--quant-type", "full,mix", "--cache-size", "64"]
    with pytest.raises(SystemExit):
        main(["run", "--model", str(tiny_folder), *grid, *options, "--outdir", str(tmp_path / "run")])
    mine, other = results.to_pandas("samples"), load_run(tmp_path / "run").to_pandas("samples")
    assert len(mine) == 4
    mine, other = (frame.drop(columns=[*TIMES, "start"], errors="ignore") for frame in (mine, other))
    assert mine.equals(other)


def test_rows_and_samples_as_frames(results: Results) -> None:
    rows = results.to_pandas()
    assert list(rows["method"]) == ["full", "mix"]
    assert set(rows["cache_size"].dropna()) == {64}
    samples = results.to_pandas("samples")
    assert set(samples["scores.exact_match"]) <= {0.0, 1.0}
    assert "place" not in samples
    assert [sample.cell for sample in results.samples()] == list(samples["cell"])
    with pytest.raises(UserError, match="give 'rows' or 'samples'"):
        results.to_pandas("lines")  # type: ignore[arg-type]


def test_the_table_is_the_report_s(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    results.table()
    mine = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["report", str(results.path)])
    table, _, last = capsys.readouterr().out.partition("All metrics, ")
    assert mine == table
    assert last.endswith("--html page.html\n")
    assert "needle (question after), exact_match" in mine
    assert "O/Q/E" not in mine
    results.table(details=True)
    assert "O/Q/E" in capsys.readouterr().out
    both = io.StringIO()
    results.table(results, console=Console(file=both, width=100))
    assert both.getvalue().count("needle (question after), exact_match") == 2


def test_a_notebook_shows_the_tables(results: Results) -> None:
    html = results._repr_html_()
    assert "needle (question after), exact_match" in html
    assert html.startswith("<pre")
    assert "<html" not in html


def test_a_run_passes_against_itself(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    report = results.compare(results, judge_speed=False)
    assert not report.failed
    assert capsys.readouterr().out.strip()


def test_the_newest_run_is_loaded_where_none_is_named(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run under"):
        load_run()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(results.path)
    assert load_run().path == Path("runs/mine")


def test_shares_and_tokens_of_one_s_own(tiny_folder: Path, tmp_path: Path) -> None:
    """A task that is an object, budgets as shares, and a continued call, which measures nothing anew."""

    def call() -> Results:
        mine: Any = {"outdir": tmp_path / "run", "device": "cpu", "quiet": True, "window_size": 8}
        return evaluate(str(tiny_folder), [Animals()], ["full", "origin"], [0.5, 0.25], **mine)

    first = call()
    assert first.failures == []
    assert [row.cache_ratio for row in first.rows] == [None, 0.5, 0.25]
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert len(call().rows) == 3
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_the_lines_of_the_tutorial(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    few = lines.replace("smollm2-135m", str(tiny_folder)).replace("outdir=", "lengths=[300], samples=2, outdir=")
    exec(compile(few, "tutorial.md", "exec"), {})
    assert "needle (question after), exact_match" in capsys.readouterr().out


def test_a_model_that_is_loaded_already(results: Results, tiny_folder: Path, tmp_path: Path) -> None:
    """The answers are those of the same model by its folder, and the model is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.train()
    settings = {name: value for name, value in SMALL.items() if name not in ("device", "dtype")}

    def call(folder: str, **more: Any) -> Results:
        pair = (model, tokenizer)
        return evaluate(pair, "needle", ["full", "mix"], 64, outdir=tmp_path / folder, quiet=True, **settings, **more)

    mine = call("run").to_pandas("samples")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    names = ["document", "cell", "text", "kv_bytes", "score"]
    assert mine[names].equals(results.to_pandas("samples")[names])
    with pytest.raises(UserError, match="dtype: the model is loaded already"):
        call("other", dtype="float32")
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(UserError, match="other settings: models"):
        call("run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": "needel"}, "did you mean needle"),
        ({"methods": "mxi"}, "did you mean mix"),
        ({"budgets": [64, 0.5]}, "give whole numbers"),
        ({"budgets": [True]}, "give whole numbers"),
        ({"budgets": [8], "window_size": 16}, "window_size=16 is not smaller"),
        ({"windowsize": 16}, "unknown setting 'windowsize': did you mean window_size"),
        ({"model": ("a", 1)}, "give a transformers model and its tokenizer"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_errors_are_one_line(tiny_folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    asked: dict[str, Any] = {"model": str(tiny_folder), "tasks": "needle", "methods": "mix", "budgets": 64}
    with pytest.raises(UserError) as caught:
        evaluate(**{**asked, "outdir": tmp_path / "run", "quiet": True, **change})
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "unit"),
    [
        ({"budgets": [0.25]}, "bytes"),
        ({"budgets": 64}, "tokens"),
        ({}, "bytes"),
        ({"preset": "demo"}, "bytes"),
        ({"preset": "published"}, "tokens"),
        ({"budgets": [0.25], "budget_unit": "tokens"}, "tokens"),
    ],
)
def test_a_budget_counts_what_the_command_would(
    given: dict[str, Any], unit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Asked(Exception):
        pass

    def execute(config: Any, *arguments: Any, **named: Any) -> None:
        raise Asked(config.budget_unit)

    monkeypatch.setattr("bench.runs.run.execute", execute)
    with pytest.raises(Asked, match=unit):
        bench.evaluate("smollm2-135m", "needle", "mix", outdir=tmp_path, **given)
