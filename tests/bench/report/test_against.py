"""Runs beside published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.errors import UserError
from bench.records.row import Row
from bench.report.against import means, pair, read_published, to_csv, to_markdown
from tasks.longbench.datasets import DATASETS

HEADER = "model,method,budget,task,Task Type,performance\n"


def row(**changes: Any) -> Row:
    content: dict[str, Any] = {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "task": "longbench:passage_retrieval_en",
        "metric": "retrieval",
        "method": "mix",
        "budget_unit": "tokens",
        "cache_size": 512,
        "n": 200,
        "score": 91.5,
        "higher_is_better": True,
        "cell": "mix",
    }
    return Row(**{**content, **changes})


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.csv"
    path.write_text(
        HEADER
        + "Meta-Llama-3.1-8B-Instruct,ARKV,512,PassageRetr.-en,Synthetic,95.0\n"
        + "Meta-Llama-3.1-8B-Instruct,ARKV,512,2WikiMultihopQA,Multi-doc QA,40\n"
        + "Meta-Llama-3.1-8B-Instruct,Base,,NarrativeQA,Single-doc QA,30.25\n"
        + "Meta-Llama-3.1-8B-Instruct,Origin,512,gsm8k,GSM8K,50\n",
        encoding="utf-8-sig",
    )
    return path


def test_rows_meet_their_figures(published: Path) -> None:
    rows = [
        row(),
        row(task="longbench:2wikimqa", metric="qa_f1", score=41.0),
        row(task="longbench:narrativeqa", metric="qa_f1", method="full", budget_unit=None, cache_size=None, score=30.0),
        row(task="gsm8k", metric="exact_match,strict-match", method="origin", score=0.75),
        row(cache_size=1024),
        row(budget_unit="bytes"),
        row(task="needle", metric="exact_match"),
        row(model="Qwen/Qwen3-8B"),
    ]
    pairs = pair(rows, read_published(published))
    assert [(item.here, item.published, round(item.difference, 4)) for item in pairs] == [
        (91.5, 95.0, -3.5),
        (41.0, 40.0, 1.0),
        (30.0, 30.25, -0.25),
        (75.0, 50.0, 25.0),
    ]
    assert means(pairs) == [
        [rows[0].model, "mean of 2 datasets", "", "mix", "512", "", "66.25", "67.50", "-1.25"],
    ]
    assert to_csv(pairs).splitlines()[1].endswith(",mix,512,200,91.50,95.00,-3.50")
    assert "| mean of 2 datasets |" in to_markdown(pairs)


def test_no_row_has_a_figure(published: Path) -> None:
    with pytest.raises(UserError, match=r"models here: qwen3-8b; published: llama-3\.1-8b-instruct"):
        pair([row(model="Qwen/Qwen3-8B")], read_published(published))


@pytest.mark.parametrize(
    "text, message",
    [
        ("model,method,budget,task\n", "no column 'performance'"),
        (HEADER, "has no rows"),
        (HEADER + "m,Base,,NarrativeQA,x,high\n", "line 2, column 'performance': 'high' is no number"),
        (HEADER + "m,ARKV,half,NarrativeQA,x,1\n", "line 2, column 'budget': 'half' is no number of tokens"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_published(tmp_path / "p.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path / "missing.csv")


def test_the_published_table_is_understood(shared_data: Path) -> None:
    figures = read_published(shared_data / "paper_arkv" / "longbench_perf.csv")
    assert {task for _, task, _, _ in figures} == {f"longbench:{name}" for name in DATASETS}
    assert {method for _, _, method, _ in figures} == {"full", "origin", "quant", "mix"}
    assert {budget for *_, budget in figures} == {None, 512, 1024, 2048}
    assert figures["llama-3.2-3b-instruct", "longbench:narrativeqa", "full", None] == 25.5
