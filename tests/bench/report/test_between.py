"""Run against run: paired by document, everything that differs is named, and the run stands in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.names import RECORD
from bench.records.finished import read_runs
from bench.records.row import Row
from bench.report.between import Pair, between
from bench.report.between_written import AGAINST
from tests.bench.lines import line
from tests.bench.report.test_report import row, write

RECORD_OF = {
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:01:00+00:00",
    "settings": {"batch_size": "1"},
    "models": {"tiny": {"dtype": "bfloat16", "device": "cpu"}},
    "hardware": {"cpu": "one", "cores": 2, "torch_threads": 2},
    "packages": {"torch": "2.1", "transformers": "5.2"},
    "python": "3.11.7",
    "commit": "a" * 40,
    "fingerprint": {"models": {"tiny": "aaaa"}, "data": {"needle": "bbbb"}},
}
N = 12

Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def make(name: str, wrong: int = 0, *, documents: int = N, prompt: str = "p", **record: Any) -> Path:
        """A run whose ``mix`` answers the first ``wrong`` documents wrongly."""
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for cell in ("full-None", "mix-512"):
            for number in range(documents):
                score = float(cell != "mix-512" or number >= wrong)
                lines.append(
                    line(
                        f"d{number}",
                        cell,
                        model="tiny",
                        task="needle",
                        prompt_sha256=f"{prompt}{number}",
                        score=score,
                        scores={"exact_match": score},
                    )
                )
        (folder / "samples.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
        rows: list[Row] = [
            row("full", 1.0, None, n=documents, cell="full-None"),
            row("mix", 1.0 - wrong / documents, n=documents),
        ]
        write(folder, rows)
        (folder / RECORD).write_text(json.dumps({**RECORD_OF, **record}))
        return folder

    return make


def pair(*folders: Path) -> Pair:
    (found,) = between(read_runs(folders))
    return found


def test_differences_are_paired_by_document(made: Made) -> None:
    found = pair(made("a"), made("b", 8))
    full, mix = found.changes
    assert (full.n, full.difference, full.lost, full.found, full.said) == (N, 0.0, 0, 0, "tied")
    assert (mix.before, mix.now, mix.difference) == pytest.approx((1.0, 1 / 3, -2 / 3))
    assert (mix.lost, mix.found) == (8, 0)
    assert mix.high is not None
    assert mix.high < 0
    assert mix.said.startswith("worse, p ")
    # The other way round it is better by as much.
    back = pair(made("c", 8), made("d")).changes[1]
    assert back.difference == pytest.approx(2 / 3)
    assert back.said.startswith("better")


def test_only_documents_of_both_count_and_it_is_said(made: Made) -> None:
    found = pair(made("a", 2), made("b", 2, documents=7))
    assert [change.n for change in found.changes] == [7, 7]
    assert found.changes[1].before == found.changes[1].now
    assert any(note.startswith("n: documents that both runs have answered") for note in found.notes)


def test_no_document_in_common_is_said(made: Made) -> None:
    a, b = made("a"), made("b")
    lines = (b / "samples.jsonl").read_text().replace('"document": "d', '"document": "e')
    (b / "samples.jsonl").write_text(lines)
    found = pair(a, b)
    assert found.changes == []
    assert found.notes == ["no document of needle, tiny, in common", "nothing in common that could be compared"]


def test_runs_of_different_models_say_so_first(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made("a"), made("b", settings={"batch_size": "1", "seed": 1})
    assert not any(term.startswith("model: ") for term in pair(first, second).terms)
    for name in ("samples.jsonl", "results.csv"):
        (second / name).write_text((second / name).read_text().replace("tiny", "large"))
    found = pair(first, second)
    assert found.terms[0] == "model: tiny in a, large in b; runs of different models are not compared"
    assert found.changes == []
    with pytest.raises(SystemExit) as ended:
        main(["report", str(first), str(second)])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "- differs: model: tiny in a, large in b;" in said.partition("b against a")[2].splitlines()[1]


def test_what_must_not_be_compared_is_not(made: Made) -> None:
    found = pair(made("a"), made("b", prompt="q"))
    assert found.changes == []
    assert any("other prompts for 12 of 12 documents, the first is d0" in note for note in found.notes)
    other = {"fingerprint": {"models": {"tiny": "cccc"}, "data": {}}}
    assert any("another fingerprint of the model" in note for note in pair(made("c"), made("d", **other)).notes)


def test_everything_that_differs_is_named(made: Made) -> None:
    assert pair(made("a"), made("b")).terms == []
    found = pair(
        made("c"),
        made(
            "d",
            models={"tiny": {"dtype": "float32", "device": "cuda:0"}},
            hardware={"cpu": "other", "cores": 2, "torch_threads": 1, "gpus": ["H100"]},
            packages={"torch": "2.2", "transformers": "5.2"},
            commit="b" * 40,
            dirty=True,
        ),
    )
    assert set(found.terms) == {
        "dtype of tiny: bfloat16 in c, float32 in d",
        "device of tiny: cpu in c, cuda:0 in d",
        "cpu: one in c, other in d",
        "torch_threads: 2 in c, 1 in d",
        "gpus: unknown in c, ['H100'] in d",
        "torch: 2.1 in c, 2.2 in d",
        f"commit: {'a' * 12} in c, {'b' * 12} with changes in d",
    }


@pytest.fixture
def formats(tmp_path: Path) -> Made:
    def make(name: str, *kinds: str, ratio: float = 0.25, window: int = 32, **record: Any) -> Path:
        """A run of ``mix`` in some formats, each a cell of its own."""
        folder = tmp_path / name
        folder.mkdir()
        lines, rows = [], [row("full", 1.0, None, n=N, cell="full")]
        for kind in ("full", *kinds):
            cell = kind if kind == "full" else f"mix-{kind}-{ratio}-{window}"
            about: dict[str, Any] = {"quant_format": None, "budget_unit": None, "cache_size": None, "window_size": None}
            if kind != "full":
                about |= {"quant_format": kind, "budget_unit": "bytes", "cache_ratio": ratio, "window_size": window}
                rows.append(row("mix", 1.0, n=N, cell=cell, **about))
            asked = {"model": "tiny", "task": "needle", "scores": {"exact_match": 1.0}, **about}
            lines += [line(f"d{number}", cell, prompt_sha256=str(number), **asked) for number in range(N)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
        write(folder, rows)
        (folder / RECORD).write_text(json.dumps({**RECORD_OF, **record}))
        return folder

    return make


def test_rows_that_differ_in_their_settings_alone_are_paired_and_it_is_said(
    formats: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"batch_size": "1", "methods": ["mix"], "original_share": None}
    a = formats("a", "int8", settings={**asked, "quant_format": ["int8"]})
    b = formats("b", "k4v3", window=64, settings={**asked, "quant_format": ["k4v3"], "original_share": 0.2})
    found = pair(a, b)
    assert [(change.row.method, change.n) for change in found.changes] == [("full", N), ("mix", N)]
    assert found.notes == []
    assert found.terms == ["quant_format: int8 in a, k4v3 in b", "original_share: the default in a, 0.2 in b"]
    monkeypatch.setenv("COLUMNS", "80")
    report(a, b)
    terminal = capsys.readouterr().out
    assert max(map(len, terminal.splitlines())) <= 80
    said = "paired by method and budget, though its settings differ: mix int8 to k4v3, window 32 to 64"
    assert said in " ".join(terminal.split())
    report(a, b, "--format", "markdown")
    assert "| mix int8 to k4v3, window 32 to 64 | 25 % |" in capsys.readouterr().out


def test_what_could_be_paired_with_several_is_paired_with_none_and_they_are_named(formats: Made) -> None:
    found = pair(formats("a", "int8"), formats("b", "k4v3", "int4"))
    assert [change.row.method for change in found.changes] == ["full"]
    (said,) = found.notes
    budget = "25 % of each prompt's bytes (window 32)"
    assert said.startswith(
        f"not paired: mix int8 {budget}, while b has mix k4v3 {budget}; int4 {budget}: rows are paired"
    )
    # The one with the same settings is meant, whatever stands beside it.
    found = pair(formats("c", "int8"), formats("d", "k4v3", "int8"))
    assert [change.cell for change in found.changes] == ["full", "mix-int8-0.25-32"]
    assert not any(change.settings for change in found.changes)


def test_another_budget_is_no_other_setting(formats: Made) -> None:
    found = pair(formats("a", "int8"), formats("b", "int8", ratio=0.125))
    assert [change.row.method for change in found.changes] == ["full"]
    assert "while b has mix int8 12.5 % of each prompt's bytes" in found.notes[0]


def test_a_method_that_is_not_there_is_named(made: Made, formats: Made) -> None:
    a, b = made("a"), formats("b")
    assert any(note == "not in b: mix" for note in pair(a, b).notes)


def report(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, arguments)])
    assert not ended.value.code


def test_the_run_is_a_column_of_every_format(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    a, b = made("first"), made("second", 8, commit="b" * 40)
    report(a, b)
    terminal = capsys.readouterr().out
    assert max(map(len, terminal.splitlines())) <= 80
    assert "second against first: needle, exact_match, tiny" in terminal
    assert "worse, p" in terminal
    assert "differs: commit" in terminal
    for name in ("first", "second"):
        assert any(text.startswith(f"{name} ") and "mix" in text for text in terminal.splitlines())
    report(a, b, "--format", "markdown")
    markdown = capsys.readouterr().out
    assert "| run | budget | method |" in markdown
    assert "| run | task, metric | method |" in markdown
    assert "- differs: commit" in markdown
    report(a, b, "--latex", tmp_path / "table.tex")
    latex = (tmp_path / "table.tex").read_text()
    assert "run & budget & method" in latex
    assert r"\caption{second against first}" in latex


def test_the_csv_has_the_change_beside_the_row(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made("first"), made("second", 8)
    report(a, b, "--format", "csv")
    lines = [item for item in csv.DictReader(io.StringIO(capsys.readouterr().out)) if item["method"] == "mix"]
    assert [item["run"] for item in lines] == ["first", "second"]
    assert {lines[0][name] for name in AGAINST} == {""}
    assert lines[1]["against_run"] == "first"
    assert float(lines[1]["change"]) == pytest.approx(-2 / 3)
    assert float(lines[1]["change_high"]) < 0
    report(a, "--format", "csv")
    assert not {*AGAINST, "run"} & {*capsys.readouterr().out.splitlines()[0].split(",")}
