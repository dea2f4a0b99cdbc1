"""Tables that a person reads, from files that a person may have edited."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.cli import main
from bench.errors import UserError
from bench.judge.speed import summarize
from bench.names import RECORD, RESULTS
from bench.records.finished import Run, read_runs
from bench.records.row import COLUMNS, Row, read_results
from bench.records.shown import headline
from bench.records.timing import Timing
from bench.report.columns import EVERYTHING, LEGEND, SHARE
from bench.report.comparison import compare
from bench.report.page import build
from bench.report.speed import speed_table
from bench.report.terminal import print_comparison
from bench.report.verdicts import answer
from bench.report.writing import to_csv, to_latex, to_markdown


def row(method: str, score: float, cache_size: int | None = 512, **more: Any) -> Row:
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
        "score_low": score - 0.1,
        "score_high": score + 0.1,
        "difference": None if full else score - 1.0,
        "difference_low": None if full else score - 1.1,
        "difference_high": None if full else score - 0.9,
        "p_value": None if full else 0.01,
        "p_holm": None if full else 0.03 if score < 0.6 else 0.4,
        "p_adjusted": None if full else 0.03 if score < 0.6 else 0.4,
        "p_bh": None if full else 0.02,
        "detectable_difference": None if full else 0.52,
        "kv_bytes_mean": 46_000_000.0,
        "kv_bytes_peak": 47_000_000,
        "kv_share": 1.0 if full else 0.25,
        "kv_share_of_prompt": 1.0 if full else 0.25,
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
    return Row(**values)


ROWS = [
    row("window", 0.0),
    row("origin", 0.5),
    row("mix", 0.875),
    row("window", 1.0, 1024),
    row("mix", 1.0, 1024),
    row("full", 1.0),
]


def printed(rows: list[Row], width: int, **console: Any) -> str:
    output = Console(file=io.StringIO(), width=width, **console)
    print_comparison([rows], output)
    return output.file.getvalue()  # type: ignore[attr-defined]


def timing(method: str, length: int, size: int | None, **more: Any) -> Timing:
    values: dict[str, Any] = {
        "method": method,
        "quant_format": None,
        "context_length": length,
        "cache_size": size,
        "prefill_s": 12.3456,
        "compress_s": 0.123456,
        "ttft_ms": 12345.6,
        "tpot_ms": 123.456,
        "decode_tokens_per_s": 8.1,
        "kv_bytes": 123_456_789,
        "peak_memory_bytes": None,
        "repetition": 0,
        **more,
    }
    return Timing(**values)


def test_speed_fits_80_columns() -> None:
    timings = [
        timing(method, length, size, quant_format="int8" if method == "mix" else None)
        for length in (2048, 31500)
        for method, size in (("full", None), ("ceiling", 512), ("ceiling", 1024), ("mix", 512), ("mix", 1024))
    ]
    output = Console(file=io.StringIO(), width=80)
    output.print(speed_table(summarize(timings), "tiny, bfloat16, cpu: medians of 1 repetitions", output.width))
    lines = output.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in "".join(lines)
    for shown in ("31500", "1024", "ceiling", "int8", "123.5", "123.46", "12.35"):
        assert any(shown in line for line in lines)
    # By context, then by C.
    assert [line.split()[:3] for line in lines if line.split()[:1] == ["31500"]] == [
        ["31500", "full", "123.5"],
        ["31500", "512", "ceiling"],
        ["31500", "512", "mix"],
        ["31500", "1024", "ceiling"],
        ["31500", "1024", "mix"],
    ]


def write(path: Path, rows: Sequence[Row], changed: dict[str, str] | None = None) -> Path:
    """A results.csv with every digit of the rows; ``changed`` are cells of the last one."""
    cells = [{name: getattr(item, name) for name in COLUMNS} for item in rows]
    cells[-1] |= changed or {}
    with open(path / RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(cells)
    return path


def test_full_on_top_budgets_grouped_and_most_bytes_first() -> None:
    rows = [row("mix", 1.0, kv_bytes_mean=9e6), row("window", 0.0, kv_bytes_mean=11e6)]
    rows += [row("mix", 1.0, 1024, kv_bytes_mean=20e6), row("full", 1.0)]
    fixed = {"cache_size": None, "budget_unit": None, "window_size": None}
    rows.append(row("hf:quanto-int4", 1.0, **fixed, kv_bytes_mean=13e6, kv_share_of_prompt=0.281, kv_share=0.25))
    (comparison,) = compare(rows)
    assert [[r.method for r in group] for group in comparison.groups] == [
        ["full"],
        ["mix"],
        ["hf:quanto-int4"],
        ["window", "mix"],
    ]
    assert comparison.title == "needle, exact_match (higher is better), tiny, n=8"
    said = "hf:quanto-int4 is of a fixed size: 28.1 % of the prompt's bytes, 25.0 % of what full holds in the end"
    assert said in comparison.notes


def test_peers_without_a_window_and_methods_with_their_own_join_their_budget() -> None:
    peer = row("kvpress:snapkv", 0.5, window_size=None)
    assert [len(group) for group in compare([row("mix", 1.0), peer])[0].groups] == [2]
    # So does a method that has a window of its own.
    own = row("mix-replay", 0.5, window_size=4)
    assert [len(group) for group in compare([row("mix", 1.0), peer, own])[0].groups] == [3]
    # Unless the run compares windows: then nothing says to which of them it belongs.
    other = row("mix", 1.0, window_size=8)
    assert [len(group) for group in compare([row("mix", 1.0), other, peer])[0].groups] == [1, 1, 1]


def test_budgets_stand_in_order_beside_methods_that_free_no_bytes() -> None:
    ratios = (0.0625, 0.25, 0.125)
    rows = [row("full", 1.0)]
    for place, ratio in enumerate(ratios):
        given = {"cache_ratio": ratio, "budget_unit": "bytes"}
        rows.append(row("mix", 0.5, None, **given, kv_bytes_mean=46e6 * ratio, cell=f"mix-{ratio}"))
        masked = 47e6 - 1e6 * place
        rows.append(row("kvpress:kvzip", 0.5, None, **given, kv_bytes_mean=masked, cell=f"kvzip-{ratio}"))
    (comparison,) = compare(rows)
    assert [group[0].cache_ratio for group in comparison.groups] == [None, 0.25, 0.125, 0.0625]


def test_lower_can_be_better() -> None:
    (comparison,) = compare([row(m, s, higher_is_better=False) for m, s in (("window", 0.9), ("mix", 0.1))])
    assert "lower is better" in comparison.title
    # 0.1 is 0.9 below full, which is good here.
    low = {"higher_is_better": False, "score_full": 1.0}
    assert "| better, p 0.030 |" in to_markdown([[row("mix", 0.1, **low)]])


def test_shares_and_units_are_budgets_of_their_own() -> None:
    share = {"cache_size": None, "cache_ratio": 0.125, "budget_unit": "bytes"}
    rows = [row("mix", 1.0, **share), row("origin", 0.5, **share), row("mix", 0.5, 512)]
    (comparison,) = compare(rows)
    assert [len(group) for group in comparison.groups] == [2, 1]
    assert "12.5 %" in printed(rows, 120)


@pytest.mark.parametrize("width", [80, 140])
def test_nothing_is_cut_off(width: int) -> None:
    text = printed(ROWS, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert "no room for" not in text
    shown = (
        "0.875",
        "[0.78, 0.97]",
        "-0.125",
        "[-0.23, -0.03]",
        "46.0 MB",
        "25.0 %",
        "20/5/75",
        "123.5",
        "int8",
        "1024",
    )
    assert [item for item in shown if item not in text] == []
    assert ("tied  " in text) == (width == 140)
    assert ("0.400" in text) == (width == 80)
    for line in LEGEND:
        assert line.split()[-1] in text


def test_long_names_leave_the_numbers_their_room() -> None:
    text = printed([*ROWS, row("kvpress:expected_attention", 0.5, window_size=None)], 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert any("expected_attention" in line for line in text.splitlines())
    assert "TTFT s, TPOT ms: see results.csv" in " ".join(text.split())


def test_columns_without_room_are_named() -> None:
    text = printed(ROWS, 60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "no room for O/Q/E %, TTFT s, TPOT ms" in " ".join(text.split())
    assert "0.875" in text


def test_small_numbers_keep_two_digits_and_percentages_lose_decimals() -> None:
    kl = {"score_low": 0.0012, "score_high": 0.0084, "difference": 0.0044}
    text = printed([row("mix", 0.0044, **kl), row("window", 16.94, score_low=None, difference=-3.21)], 140)
    for shown in ("0.0044", "[0.0012, 0.0084]", "+0.0044", "16.9", "-3.210"):
        assert shown in text


def test_leaders_are_bold() -> None:
    rows = [row("full", 1.0), row("window", 0.5, leading=False), row("mix", 0.875, leading=True)]
    text = printed(rows, 140, force_terminal=True, color_system="standard")
    assert "\x1b[1m" in next(line for line in text.splitlines() if "0.875" in line)
    assert "\x1b[1m" not in next(line for line in text.splitlines() if "0.500" in line)
    markdown = to_markdown([rows])
    assert "| **512** | **mix** | **int8** | **0.875** |" in markdown
    assert "| 512 | window |" in markdown
    assert "- bold: the best of a budget, and what is tied with it" in markdown
    assert "bold" not in to_markdown([ROWS])


def test_a_difference_is_never_called_more_than_it_is() -> None:
    markdown = to_markdown([ROWS])
    assert "| tied |" in next(line for line in markdown.splitlines() if "0.875" in line)
    assert "| worse, p 0.030 |" in next(line for line in markdown.splitlines() if "| origin |" in line)
    assert "- smallest difference to full that so many documents show with 80 % power: 0.52" in markdown
    nothing = [row("mix", 0.5, detectable_difference=None)]
    assert "- so few documents cannot show a difference to full" in to_markdown([nothing])


def test_a_row_that_is_tied_with_full_and_behind_the_best_is_explained() -> None:
    best = row("mix", 1.0, p_adjusted=0.7, leading=True)
    behind = row("quant", 0.5, p_adjusted=0.06, leading=False, p_to_best=0.01)
    said = "tied with full and still behind the best of the budget: quant int8 at 512; a tie means that so many"
    assert said in to_markdown([[row("full", 0.9), best, behind]])
    assert said in " ".join(printed([row("full", 0.9), best, behind], 80).split())
    # Nor worse than full and behind, nor tied with both.
    worse = row("quant", 0.2, p_adjusted=0.01, leading=False, p_to_best=0.01)
    equal = row("quant", 0.9, p_adjusted=0.8, leading=False, p_to_best=0.4)
    for other in (worse, equal):
        assert "behind the best" not in to_markdown([[row("full", 0.9), best, other]])


def test_an_older_file_shows_no_interval_beside_a_verdict_of_another_procedure() -> None:
    older = [row("full", 1.0), row("mix", 0.875, p_adjusted=None)]
    text = to_markdown([older])
    assert "| tied |" in text
    assert "[-0.23, -0.03]" not in text
    assert "is of an older suite: p by Holm" in text


def test_a_divergence_is_compared_with_the_best_of_its_budget() -> None:
    untested = dict.fromkeys(("p_value", "p_holm", "p_adjusted", "difference", "difference_low", "difference_high"))
    best = row("mix", 0.01, **untested)
    behind = row("window", 0.02, **untested, to_best=2.0, p_to_best=0.004)
    alike = row("origin", 0.011, **untested, to_best=1.1, p_to_best=0.5)
    text = to_markdown([[row("full", 0.0), best, behind, alike]])
    assert "| 2 x the best, p 0.004 |" in text
    assert "| like the best |" in text
    assert "a distance from full is not compared with full" in text
    # A score without a full cache beside it is no distance.
    text = to_markdown([[best, behind, alike]])
    assert "a distance" not in text
    assert "- full was not measured: each row is compared with the best at the same budget, paired; like" in text


def test_a_row_that_was_not_exercised_says_so() -> None:
    rows = [row("full", 1.0), row("window", 0.5), row("mix", 1.0, compressed_documents=0, p_holm=None, p_adjusted=None)]
    assert "| not exercised |" in next(line for line in to_markdown([rows]).splitlines() if "| mix |" in line)
    for width in (80, 140):
        text = printed(rows, width)
        assert "not exercised: every prompt and answer fits the budget" in text
        assert any("not exercised " in line for line in text.splitlines() if not line.startswith("-"))


def test_bytes_off_the_budget_have_a_footnote() -> None:
    share = {"cache_size": None, "cache_ratio": 0.25, "budget_unit": "bytes"}
    rows = [row("mix", 1.0, **share, kv_share=0.235, kv_share_of_prompt=0.2451)]
    rows.append(row("kvpress:snapkv", 0.5, **share, kv_share=0.262, kv_share_of_prompt=0.2731))
    rows.append(row("kvpress:snapkv", 0.5, **{**share, "cache_ratio": 0.125}, kv_share_of_prompt=0.1411))
    text = to_markdown([rows])
    (said,) = [line for line in text.splitlines() if "not within 2 % of the bytes asked for" in line]
    # The row itself says why, in a word.
    assert "46.0 MB, answer on top" in text
    assert ["26.2 %*", "46.0 MB, answer on top"] in [SHARE.cell(item).split("\n") for item in rows]
    masks = row("kvpress:kvzip", 0.5, **share, kv_share_of_prompt=1.1)
    assert SHARE.cell(masks).endswith("46.0 MB, masked")
    assert SHARE.cell(row("kvpress:kvzip", 0.5, **share, kv_share_of_prompt=0.25)).endswith("46.0 MB")
    # The table's share is of other bytes than the budget.
    assert "as shares of the prompt's bytes (KV of full is a share of what full holds in the end)" in said
    assert said.endswith(": kvpress:snapkv 27.3 % for 25 %, 14.1 % for 12.5 %")
    assert "26.2 %\\*" in text
    assert "23.5 % |" in text
    # A share of the tokens promises no bytes.
    tokens = row("mix", 1.0, **{**share, "budget_unit": "tokens"}, kv_share_of_prompt=0.4)
    assert "not within" not in to_markdown([[tokens]])


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
    (tmp_path / "all.csv").write_text(to_csv({"one": rows}))
    assert read_results(tmp_path / "all.csv") == ROWS


def test_csv_of_several_runs_says_which(tmp_path: Path) -> None:
    text = to_csv({"one": ROWS, "two": ROWS})
    assert [line.partition(",")[0] for line in text.splitlines()] == ["run", *["one"] * 6, *["two"] * 6]
    (tmp_path / "all.csv").write_text(text)
    assert [item.run for item in read_results(tmp_path / "all.csv")] == ["one"] * 6 + ["two"] * 6


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
        ("higher_is_better", "", "empty"),
        ("leading", "1", "neither True nor False"),
        ("budget_unit", "pages", "neither tokens nor bytes"),
    ],
)
def test_nonsense_names_line_and_column(tmp_path: Path, column: str, value: str, said: str) -> None:
    write(tmp_path, ROWS[:2], {column: value})
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
        ((",".join(COLUMNS) + "\n" + "1," * (len(COLUMNS) + 1) + "\n").encode(), "line 2: more cells than columns"),
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


def test_parts_of_a_group_with_a_score_of_its_own_are_left_out() -> None:
    group, part = row("mix", 0.5, task="mmlu"), row("mix", 0.4, task="mmlu_law", part_of="mmlu")
    dataset = row("mix", 40.0, task="longbench:trec", part_of="longbench")
    assert headline([part, group, dataset]) == [group, dataset]


def test_latex_has_every_row_and_obeys_no_name() -> None:
    nasty = row("mix", 0.875, model=r"a_b\\input{x}%$&#~^{}|<>", leading=True)
    text = to_latex([[nasty, *ROWS]])
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}") == 2
    assert r"a\_b\textbackslash{}\textbackslash{}input\{x\}\%\$\&\#\textasciitilde{}\textasciicircum{}\{\}" in text
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(body) == 2 + 1 + len(ROWS)
    assert len({line.replace(r"\&", "").count("&") for line in body}) == 1
    assert r"\textbf{mix}" in text
    assert "$-$0.125 & [$-$0.23, $-$0.03]" in text
    assert "& tied &" not in text.split(r"\bottomrule")[0]
    # Braces and environments are balanced.
    plain = text.replace(r"\{", "").replace(r"\}", "")
    assert plain.count("{") == plain.count("}")
    assert text.count(r"\begin{") == text.count(r"\end{")


def test_latex_is_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ROWS)
    (tmp_path / "file").write_text("")
    absent = tmp_path / "absent" / "table.tex"
    for target, code in ((tmp_path / "table.tex", 0), (absent, 0), (tmp_path / "file" / "table.tex", 1)):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path), "--latex", str(target)])
        assert ended.value.code == code
    assert (tmp_path / "table.tex").read_text() == absent.read_text() == to_latex([read_results(tmp_path)])
    assert "cannot be written" in capsys.readouterr().err


def test_the_share_of_the_score_that_is_kept_stands_in_every_table_or_a_note_says_why_not() -> None:
    ends = {"retention_low": 0.71, "retention_high": 1.02}
    rows = [row("full", 1.0), row("mix", 0.875, **ends), row("origin", 1.0, compressed_documents=0)]
    assert "| 88 % [71, 102] |" in to_markdown([rows])
    assert "88 % [71, 102]" in printed(rows, 180)
    for width in (80, 140):
        assert "88 %" in printed(rows, width)
    # Nothing was compressed there, and full keeps all of its own score whatever it is.
    assert "100 %" not in to_markdown([rows])
    for more, why in (
        ({"score_full": 0.1}, "full itself scores 0.100, next to nothing"),
        ({"chance": 0.25}, "full itself scores 0.100, next to what guessing does"),
        ({"metric_low": 1.0, "metric_high": 5.0}, "the score begins at 1.000"),
    ):
        without = [row(method, 0.1, retention=None, **more) for method in ("full", "mix")]
        assert f"- no retention: {why}" in to_markdown([without])
        assert "score kept |" not in to_markdown([without])
    distance = [row(method, 0.1, retention=None, higher_is_better=False) for method in ("full", "mix")]
    assert "no retention" not in to_markdown([distance])


def test_what_a_method_costs_in_time_says_what_the_times_are_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, ROWS)
    record: dict[str, Any] = {"fingerprint": {}, "finished": "2026-01-01T00:00:00+00:00"}
    starts = [
        {"hardware": {"cpu": "EPYC", "torch_threads": threads}, "batch_size": batch}
        for threads, batch in ((1, "auto"), (2, "auto"))
    ]
    for given, said in (
        ({}, ""),
        ({"hardware": {"torch_threads": 4}, "settings": {"batch_size": 8}}, "4 threads, batch size 8"),
        ({"starts": starts[:1]}, "EPYC, 1 thread, batch size auto"),
        ({"starts": starts}, "EPYC, 1 or 2 threads, batch size auto"),
    ):
        (tmp_path / RECORD).write_text(json.dumps({**record, **given}))
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path)])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"Times are of this run{f' ({said})' if said else ''}, beside whatever else the machine did" in shown
        assert shown.count(f"Times: {said}.") == bool(said)
        (run,) = read_runs([tmp_path])
        costs = [line.cost for line in answer(run).lines]
        assert ["1.00 x its time per token; " in cost for cost in costs] == [True] * len(costs)
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path), "--format", "markdown"])
        assert capsys.readouterr().out.count(f"Times: {said}.") == bool(said)
        assert build([run]).html.count(f"<li>Times: {said}.</li>") == bool(said)
    untimed = [one.model_copy(update={"ttft_ms": None, "tpot_ms": None}) for one in ROWS]
    assert not any("Times" in note for note in answer(Run(name="a", rows=untimed)).notes)
