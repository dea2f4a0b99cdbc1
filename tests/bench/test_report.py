"""Tables that a person reads, from files that a person may have edited."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.errors import UserError
from bench.records import COLUMNS, RESULTS
from bench.report.tables import EVERYTHING, LEGEND, compare, print_comparison, read_results, to_csv, to_markdown


def row(method: str, score: float, cache_size: int | None = 512, **more: Any) -> dict[str, Any]:
    full = method == "full"
    values: dict[str, Any] = {
        "model": "tiny",
        "task": "needle",
        "metric": "exact_match",
        "method": method,
        "quant_format": "int8" if method in ("quant", "mix") else None,
        "budget_unit": None if full else "tokens",
        "cache_size": None if full else cache_size,
        "window_size": None if full else 32,
        "n": 8,
        "score": score,
        "score_full": 1.0,
        "retention": score,
        "kv_bytes_mean": 46_000_000.0,
        "kv_bytes_peak": 47_000_000,
        "kv_share": 1.0 if full else 0.25,
        "original_share": 1.0 if full else 0.2,
        "quantized_share": 0.0 if full else 0.05,
        "evicted_share": 0.0 if full else 0.75,
        "compressed_documents": 0 if full else 8,
        "ttft_ms": 3210.4,
        "tpot_ms": 123.54,
        "decode_tokens_per_s": 8.1,
        "truncated_documents": 0,
        "higher_is_better": True,
        "cell": f"{method}-{cache_size}",
        **more,
    }
    return {name: values.get(name) for name in COLUMNS}


ROWS = [
    row("window", 0.0),
    row("origin", 0.5),
    row("mix", 0.875),
    row("window", 1.0, 1024),
    row("mix", 1.0, 1024),
    row("full", 1.0),
]


def printed(rows: list[dict[str, Any]], width: int, **console: Any) -> str:
    output = Console(file=io.StringIO(), width=width, **console)
    print_comparison([rows], output)
    return output.file.getvalue()  # type: ignore[attr-defined]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path / RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_full_on_top_budgets_grouped_best_of_each_marked() -> None:
    (comparison,) = compare(ROWS)
    assert [[r["method"] for r in group] for group in comparison.groups] == [
        ["full"],
        ["window", "origin", "mix"],
        ["window", "mix"],
    ]
    # The second budget is a draw: nobody is best.
    assert comparison.best == {(1, 2)}
    assert comparison.title == "needle, exact_match (higher is better), tiny, n=8"


def test_lower_can_be_better() -> None:
    (comparison,) = compare([row(m, s, higher_is_better=False) for m, s in (("window", 0.9), ("mix", 0.1))])
    assert comparison.best == {(0, 1)}
    assert "lower is better" in comparison.title


def test_shares_and_units_are_budgets_of_their_own() -> None:
    share = {"cache_size": None, "cache_ratio": 0.125, "budget_unit": "bytes"}
    rows = [row("mix", 1.0, **share), row("origin", 0.5, **share), row("mix", 0.5, 512)]
    (comparison,) = compare(rows)
    assert [len(group) for group in comparison.groups] == [2, 1]
    assert "12.5 %" in printed(rows, 120)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off(width: int) -> None:
    text = printed(ROWS, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert "no room for" not in text
    for shown in ("0.875", "87.5 %", "46.0 MB", "25.0 %", "123.5", "int8", "1024"):
        assert shown in text
    assert ("20.0 %" in text) == (width == 120)
    assert ("20/5/75" in text) == (width == 80)
    for line in LEGEND:
        assert line.split()[-1] in text


def test_columns_without_room_are_named() -> None:
    text = printed(ROWS, 60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "no room for TTFT s, ms per token" in " ".join(text.split())
    assert "0.875" in text


def test_best_is_bold() -> None:
    text = printed(ROWS, 120, force_terminal=True, color_system="standard")
    bold = [line for line in text.splitlines() if "\x1b[1m" in line and "0.875" in line]
    assert len(bold) == 1
    assert "\x1b[1m" not in next(line for line in text.splitlines() if "0.500" in line)
    markdown = to_markdown([ROWS])
    assert "| **512** | **mix** | **int8** | **0.875** |" in markdown
    assert "| 512 | origin |" in markdown


def test_a_row_that_was_not_exercised_says_so_and_never_wins() -> None:
    rows = [row("full", 1.0), row("window", 0.5), row("origin", 0.4), row("mix", 1.0, compressed_documents=0)]
    (comparison,) = compare(rows)
    assert comparison.best == {(1, 0)}
    assert "mix (not exercised)" in to_markdown([rows])
    for width in (80, 120):
        text = printed(rows, width)
        assert "not exercised: every prompt and answer fits the budget" in text
        assert any(line.split() == ["not", "exercised"] for line in text.splitlines())


def test_cut_prompts_and_uneven_counts_are_noted() -> None:
    notes = compare([row("full", 1.0, truncated_documents=3), row("mix", 1.0, n=5)])[0].notes
    assert any("3 prompts were longer" in note for note in notes)
    assert any("not complete" in note for note in notes)


def test_markdown_is_a_table() -> None:
    lines = [line for line in to_markdown([ROWS]).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(EVERYTHING) + 1}
    assert len(lines) == 2 + len(ROWS)


def test_csv_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = read_results(write(tmp_path, ROWS))
    assert rows == ROWS
    (tmp_path / "all.csv").write_text(to_csv([rows, rows]))
    assert read_results(tmp_path / "all.csv") == ROWS * 2


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    evil = [row("full", 1.0, model="[red]x[/red]\x1b[2J", task="a|b")]
    rows = read_results(write(tmp_path, evil))
    text = printed(rows, 120, force_terminal=True)
    assert "\x1b[2J" not in text
    assert "[red]x[/red]\\x1b[2J" in text
    assert "a\\|b" in to_markdown([rows])


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("score", "high", "'high' is no number"),
        ("score", "nan", "'nan' is no number"),
        ("kv_share", "inf", "'inf' is no number"),
        ("cache_size", "5.5", "'5.5' is no number"),
        ("n", "", "empty"),
        ("method", "", "empty"),
        ("higher_is_better", "maybe", "neither True nor False"),
        ("budget_unit", "pages", "neither tokens nor bytes"),
    ],
)
def test_nonsense_names_line_and_column(tmp_path: Path, column: str, value: str, said: str) -> None:
    write(tmp_path, [ROWS[0], {**ROWS[1], column: value}])
    with pytest.raises(UserError) as caught:
        read_results(tmp_path)
    assert f"line 3, column {column!r}" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no column 'model'"),
        (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
        ((",".join(COLUMNS) + "\n").encode(), "no rows"),
        ((",".join(COLUMNS) + "\n" + "1," * 60 + "\n").encode(), "line 2: more cells than columns"),
        ((",".join(COLUMNS) + "\nonly\n").encode(), "line 2, column 'task': empty"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_results(tmp_path)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        read_results(tmp_path)
