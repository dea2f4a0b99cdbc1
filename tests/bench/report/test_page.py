"""The page about runs: what it says, that nothing in a run can break out of it, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cli import main
from bench.engine.inspect import states_map
from bench.errors import UserError
from bench.records.finished import read_runs
from bench.records.row import Row
from bench.records.sample import Sample
from bench.records.states import MapRecord, write_maps
from bench.records.timing import Timing, timings_csv
from bench.report.figures.canvas import FOREGROUND, SERIES
from bench.report.figures.layers import layer_means
from bench.report.figures.scores import pareto_front
from bench.report.figures.times import share_figure
from bench.report.looks import COLOURS
from bench.report.page import MAPS, Page, build
from bench.report.verdicts import TIMES, answer, verdicts
from tests.bench.browser import Browser, chromium
from tests.bench.lines import line
from tests.bench.report.test_report import ROWS, row, write

HOSTILE = "<img src=x onerror=alert(1)>&\"'$x_1^2$"
VOID = {"meta", "img", "br", "link", "input"}


def sample(cell: str, document: str = "d0", **more: Any) -> dict[str, Any]:
    return line(document, cell, **{"model": "tiny", "task": "needle", "prompt_sha256": f"hash of {document}", **more})


SAMPLES = [
    *(sample("full-None", document) for document in ("d0", "d1")),
    sample("mix-512", "d0", oq_ratios=[0.5, 1.0]),
    sample("mix-512", "d1", oq_ratios=[0.7, 1.0], truncated=True),
]


OF_SAMPLES = [item.model_copy(update={"n": 2}) if item.cell == "mix-512" else item for item in ROWS]
"""The rows of a folder that holds :data:`SAMPLES`."""


def typed(lines: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(**item) for item in lines]


RECORD = {
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:01:00+00:00",
    "failures": [],
    "fingerprint": {"models": {"tiny": "aaaa"}, "data": {"needle": "bbbb"}},
}


def make_run(
    folder: Path,
    rows: Sequence[Row] | None = None,
    samples: list[dict[str, Any]] | None = None,
    **record: Any,
) -> Path:
    folder.mkdir(parents=True)
    write(folder, OF_SAMPLES if rows is None else rows)
    lines = SAMPLES if samples is None else samples
    (folder / "samples.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    (folder / "record.json").write_text(json.dumps({**RECORD, **record}))
    return folder


def page_of(*folders: Path) -> Page:
    return build(read_runs(folders))


class Parsed(HTMLParser):
    """Tables as rows of texts, tags, attributes; fails where elements do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.answers: list[list[list[str]]] = []
        """Tables of the answer on top."""
        self._filled = self.tables
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._filled = self.answers if dict(attrs).get("class") == "verdicts" else self.tables
            self._filled.append([])
        elif tag == "tr":
            self._filled[-1].append([])
        elif tag in ("td", "th"):
            self._filled[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self._filled[-1][-1][-1] += data


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of one run."""
    return page_of(make_run(tmp_path_factory.mktemp("runs") / "run"))


def test_the_page_holds_the_figures_of_the_results(plain: Page) -> None:
    page = plain
    (table,) = Parsed(page.html).tables
    headers, *lines = table
    assert headers[:4] == ["budget", "method", "score", "Δ vs full"]
    assert [line[:4] for line in lines][:2] == [
        ["", "full", "1.000[0.90, 1.10]", ""],
        ["512", "window", "0.000[-0.10, 0.10]", "-1.000[-1.10, -0.90]"],
    ]
    assert len(lines) == len(ROWS)
    (found,) = Parsed(page.html).answers
    assert [line[0] for line in found] == ["budget", "C=1024 tokens per layer", "C=512 tokens per layer"]
    assert "worse, p 0.030" in next(line for line in lines if line[1] == "origin")
    # Score, times, ratios by layer.
    assert [figure.name for figure in page.figures] == [
        "01-needle-exact_match",
        "01-needle-exact_match-kept",
        "01-needle-exact_match-time",
        "01-needle-exact_match-oq",
    ]
    assert page.html.count("<svg") == 4
    assert "1 prompts were longer than the context or --max-length and were cut: d1" in page.html


def test_nothing_is_fetched(plain: Page) -> None:
    html = plain.html
    assert "://" not in html
    links = [value for _, attrs in Parsed(html).tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith("#") for value in links)
    assert len(html) < 3_000_000


def test_ids_are_unique_and_references_lead_somewhere(plain: Page) -> None:
    html = plain.html
    ids = [attrs["id"] for _, attrs in Parsed(html).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    model = {"model": HOSTILE, "task": HOSTILE, "metric": HOSTILE}
    rows = [item.model_copy(update={**model, "method": item.method.replace("mix", f"mix{HOSTILE}")}) for item in ROWS]
    cut = [sample("full-None", HOSTILE, model=HOSTILE, task=HOSTILE, truncated=True)]
    failure = {"model": HOSTILE, "task": HOSTILE, "error": f"</script>{HOSTILE}"}
    page = page_of(make_run(tmp_path / "run", rows, cut, failures=[failure], command="</pre><script>alert(1)</script>"))
    parsed = Parsed(page.html)
    assert "img" not in {tag for tag, _ in parsed.tags}
    kinds = [attributes.get("type") for tag, attributes in parsed.tags if tag == "script"]
    # What has a type is data that nothing runs.
    assert kinds == ["application/json", "application/json", None]
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert any(f"mix{HOSTILE}" in line[1] for line in parsed.tables[0])


def test_the_answer_names_the_best_of_each_budget(tmp_path: Path) -> None:
    rows = [
        row("full", 1.0, ttft_ms=2000.0, tpot_ms=100.0),
        row("window", 0.0, leading=False),
        row("origin", 0.5, leading=True),
        row("mix", 0.875, leading=True),
        row("window", 1.0, 1024),
        row("mix", 1.0, 1024),
        row("mix", 1.0, 4096, compressed_documents=0),
    ]
    found = answer(*read_runs([make_run(tmp_path / "run", rows)]))
    assert [line.cells for line in found.lines] == [
        ("C=4096 tokens per layer", "", "", "every prompt fits: nothing was compressed"),
        (
            "C=1024 tokens per layer",
            "window and mix int8: 1.000 [0.90, 1.10]",
            "they score the same",
            "25.0 % of full's bytes; 1.61 x its time to the first token; 1.24 x its time per token; "
            "score tied: +0.000 [-0.10, 0.10]",
        ),
        (
            "C=512 tokens per layer",
            "mix int8: 0.875 [0.78, 0.97]",
            "origin",
            "25.0 % of full's bytes; 1.61 x its time to the first token; 1.24 x its time per token; "
            "score tied: -0.125 [-0.23, -0.03]",
        ),
    ]
    assert found.notes == [
        "On needle (exact_match, tiny, n=8), the full cache scores 1.000 [0.90, 1.10]. "
        "Smallest difference to full that so many documents show with 80 % power: 0.52.",
        f"Times are of this run, {TIMES}.",
    ]


def test_the_answer_has_five_lines_at_most(tmp_path: Path) -> None:
    rows = [row("full", 1.0), *(row("mix", 1.0, size) for size in (64, 128, 256, 512, 1024, 2048, 4096))]
    found = answer(*read_runs([make_run(tmp_path / "run", rows)]))
    assert [line.budget.split()[0] for line in found.lines] == ["C=4096", "C=2048", "C=1024", "C=512", "C=256"]
    assert found.notes[-1] == "2 more budgets stand in the tables below."


def test_the_lowest_is_best_where_lower_is_better() -> None:
    rows = [row("window", 0.9, higher_is_better=False), row("mix", 0.1, higher_is_better=False)]
    (said,) = verdicts(rows)
    assert (said.best, said.equal) == ("mix int8: 0.100 [0.00, 0.20]", "window")


def test_many_tasks_are_counted(tmp_path: Path) -> None:
    tasks = [item.model_copy(update={"task": f"task{number}"}) for number in range(3) for item in ROWS]
    found = answer(*read_runs([make_run(tmp_path / "run", tasks)]))
    assert found.notes == ["3 comparisons of a model on a task, each by its first metric."]
    assert found.lines[1].cells == (
        "C=512 tokens per layer",
        "",
        "all methods in 3 of 3",
        "25.0 % of full's bytes; worse than full beyond doubt: window in 3, origin in 3",
    )


def test_rows_that_were_not_exercised_are_marked(tmp_path: Path) -> None:
    rows = [row("full", 1.0), row("window", 0.5), row("mix", 1.0, compressed_documents=0)]
    html = page_of(make_run(tmp_path / "run", rows)).html
    idle = re.findall(r'<tr class="[^"]*\bidle">.*?</tr>', html, re.DOTALL)
    assert len(idle) == 1
    assert "not exercised" in idle[0]


@pytest.mark.slow
def test_a_page_of_many_tasks_stays_small(tmp_path: Path) -> None:
    tasks = [item.model_copy(update={"task": f"task{number}"}) for number in range(60) for item in ROWS]
    page = page_of(make_run(tmp_path / "run", tasks, []))
    assert len(page.html.encode()) < 3_000_000
    assert "The last 20 tables have no figures" in page.html


@pytest.mark.slow
def test_a_page_of_all_of_longbench_stays_small(tmp_path: Path) -> None:
    methods = ["full", "window", "origin", "quant", "mix", *(f"kvpress:press{number}" for number in range(5))]
    rows, samples = [], []
    for task in (f"dataset{number}" for number in range(21)):
        for place, method in enumerate(methods):
            size = None if place == 0 else 512
            rows.append(row(method, 1 - place / 20, size, task=task, n=10, kv_bytes_mean=1e7 * (11 - place)))
            for number in range(10):
                info = {"length": 1000 * (1 + number % 3), "depth": number / 10}
                text = {"text": "words of an answer " * 20, "info": info, "cache_size": size}
                samples.append(sample(f"{method}-{size}", f"d{number}", task=task, **text))
    page = build(read_runs([make_run(tmp_path / "run", rows, samples)]), tmp_path / "page.samples")
    assert len(page.html.encode()) < 5_000_000
    assert sum("-depth-length" in figure.name for figure in page.figures) == 12


# --- Several runs ---


def test_comparable_runs_share_a_table(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    table, changes = Parsed(page.html).tables
    assert table[0][2] == "run"
    assert {line[2] for line in table[1:]} == {"a", "b"}
    assert len(table) == 1 + 2 * len(ROWS)
    assert "must not be compared on" not in page.html
    assert "what changed from run to run stands in a table of its own" in page.html
    assert changes[0][:5] == ["run", "task, metric", "method", "budget", "n"]
    assert [line[:5] for line in changes[1:]] == [["b", "needle, exact_match", "mix int8", "512", "2"]]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fingerprint": {"models": {"tiny": "cccc"}, "data": {"needle": "bbbb"}}}, "another fingerprint of the model"),
        ({"fingerprint": {"models": {"tiny": "aaaa"}, "data": {"needle": "dddd"}}}, "another hash of the data"),
        ({"samples": [sample("full-None", "d0", prompt_sha256="other"), SAMPLES[1]]}, "other prompts for 1 of 2"),
        ({"samples": [sample("full-None", "d9")]}, "other documents (2 and 1, 0 in both)"),
    ],
)
def test_runs_that_must_not_be_compared_say_why(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    page = page_of(make_run(tmp_path / "a", ROWS[:1]), make_run(tmp_path / "b", ROWS[:1], **changed))
    assert f"a and b must not be compared on needle, tiny: {reason}" in page.html
    assert len(Parsed(page.html).tables) == 2


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=None, failures=[{"model": "tiny", "task": "lcc", "error": "no data"}])
    html = page_of(folder).html
    assert f"{folder} has not ended: 4 answers are there" in html
    assert "failed: lcc, tiny: no data" in html
    (folder / "record.json").unlink()
    (folder / "samples.jsonl").unlink()
    html = page_of(folder).html
    assert "no record.json" in html
    assert "no samples.jsonl" in html


def test_samples_of_another_making_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", samples=[{"model": "tiny"}])
    with pytest.raises(UserError, match=r"samples\.jsonl, line 1, field 'task': missing"):
        read_runs([folder])


# --- What other commands leave ---


def make_speed(folder: Path, *, size: int = 512, model: str = "aaaa", changed: str = "") -> Path:
    folder.mkdir(parents=True)
    timings = [
        Timing(
            method=method,
            quant_format=quant_format,
            context_length=length,
            cache_size=None if method == "full" else size,
            prefill_s=1.0,
            compress_s=None if method == "full" else 0.1,
            ttft_ms=1000.0,
            tpot_ms=tpot * length / 1000,
            decode_tokens_per_s=1000 / tpot,
            kv_bytes=1000 * length,
            peak_memory_bytes=None,
            repetition=0,
        )
        for length in (1000, 2000)
        for method, quant_format, tpot in (("full", None, 50.0), ("mix", "int8", 40.0))
    ]
    text = timings_csv(timings)
    (folder / "speed.csv").write_text(text.replace("40.0", changed, 1) if changed else text)
    record = {"model": {"name": "tiny", "fingerprint": model}, "hardware": {"cpu": "one"}, "finished": "2026"}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def make_maps(folder: Path, count: int = 1, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    states = states_map(torch.tensor([[[2, 1, 1, 0, 2]], [[2, 0, 0, 1, 2]]], dtype=torch.int8), [0, 1])
    where = {"model": "tiny", "task": "needle", "document": "d0", "label": "mix C=512", **more}
    write_maps(folder, [MapRecord(**where, cell=f"mix-{number}", map=states) for number in range(count)])
    return folder


def test_speed_and_maps_stand_beside_a_run(tmp_path: Path) -> None:
    page = page_of(make_maps(make_run(tmp_path / "run")), make_speed(tmp_path / "speed"))
    _, speed, growth = Parsed(page.html).tables
    assert speed[0][:5] == ["tokens", "budget", "method", "format", "TPOT ms"]
    assert [line[:6] for line in speed[1:]] == [
        ["1000", "", "full", "", "50.0", "1.00"],
        ["1000", "512", "mix", "int8", "40.0", "1.25"],
        ["2000", "", "full", "", "100.0", "1.00"],
        ["2000", "512", "mix", "int8", "80.0", "1.25"],
    ]
    # Lines through the origin, one of which is less steep.
    assert [line[2:7] for line in growth[1:]] == [
        ["full", "", "0.0", "50.00", ""],
        ["mix", "int8", "0.0", "40.00", "all"],
    ]
    assert [figure.name for figure in page.figures][-2:] == ["speed-1", "states-1-mix-0"]
    assert "needle, document d0, tiny: mix C=512" in page.html
    assert "must not be compared:" not in page.html


def test_timings_of_one_machine_and_model_share_a_figure(tmp_path: Path) -> None:
    same = [make_speed(tmp_path / "a"), make_speed(tmp_path / "b", size=256)]
    page = page_of(*same)
    assert len(page.figures) == 1
    assert len(Parsed(page.html).tables[0]) == 9
    page = page_of(*same, make_speed(tmp_path / "c", model="bbbb"))
    assert len(page.figures) == 2
    assert "Timings of a and b and c must not be compared: another model" in page.html


def test_few_maps_are_drawn(tmp_path: Path) -> None:
    page = page_of(make_maps(tmp_path / "look", MAPS + 2))
    assert len(page.figures) == MAPS
    assert "2 more states maps are in states.json" in page.html


def test_hostile_maps_stay_text(tmp_path: Path) -> None:
    page = page_of(make_maps(tmp_path / "look", document=HOSTILE, label=HOSTILE, model=HOSTILE))
    assert not {tag for tag, _ in Parsed(page.html).tags} & {"img"}


def test_a_run_that_was_killed_early_says_what_is_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=None)
    (folder / "results.csv").unlink()
    html = page_of(folder).html
    assert "no task has ended; samples.jsonl holds 4 answers: needle, full-None, in 2, needle, mix-512, in 2" in html
    assert f"{folder} has not ended: 4 answers are there" in html
    assert "there is nothing to compare" in html


@pytest.mark.parametrize(("changed", "said"), [("fast", "line 3, column 'tpot_ms'"), ("-1", "'-1' is no number")])
def test_timings_edited_into_nonsense_are_refused(tmp_path: Path, changed: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_runs([make_speed(tmp_path / "speed", changed=changed)])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        read_runs([tmp_path])


# --- Figures ---


def test_shares_of_time_need_times() -> None:
    rows = [
        row("full", 1.0, prefill_s=1.0, cell="full-None"),
        row("mix", 0.8, prefill_s=1.0, compress_s=0.5, cell="mix-512"),
    ]
    assert share_figure("shares", rows, []) is None
    # Bytes that are not known are no bar of 0.
    rows.append(row("quant", 0.7, prefill_s=1.0, kv_share=None, cell="mix-512"))
    figure = share_figure("shares", rows, typed([{**item, "decode_s": 2.5} for item in SAMPLES]))
    assert figure is not None
    time, memory = figure.canvas.axes
    widths = [round(bar.get_width()) for bar in time.patches]
    # Prefill, compression, decoding: of the full cache and of the other.
    assert widths == [29, 25, 0, 12, 71, 62]
    assert [bar.get_width() for bar in memory.patches] == [100.0, 25.0]


def test_the_front_is_what_nothing_beats() -> None:
    rows = [
        row("full", 0.9, kv_bytes_mean=100.0),
        row("mix", 0.8, kv_bytes_mean=20.0),
        row("window", 0.5, kv_bytes_mean=20.0),
        row("origin", 0.7, kv_bytes_mean=50.0),
        row("quant", 1.0, kv_bytes_mean=90.0, compressed_documents=0),
    ]
    assert [item.method for item in pareto_front(rows)] == ["mix", "full"]
    # Next to no bytes are not worth a worse score, nor an equal one.
    near = [row("mix", 0.8, kv_bytes_mean=20.2), row("window", 0.5, kv_bytes_mean=20.0), row("full", 0.8)]
    assert [item.method for item in pareto_front(near)] == ["mix"]
    lower = [item.model_copy(update={"higher_is_better": False}) for item in rows]
    assert [item.method for item in pareto_front(lower)] == ["window"]


def test_ratios_are_means_over_documents() -> None:
    assert layer_means(typed(SAMPLES)) == {"mix-512": [pytest.approx(0.6), 1.0]}


def test_figures_are_of_exactly_the_samples_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs each row has its own; of other samples than the table has no figure is made."""
    given: dict[str, list[tuple[str, str, float]]] = {}
    for name in ("share_figure", "oq_figure"):

        def noted(figure: str, rows: Sequence[Row], samples: Any, name: str = name) -> None:
            known = {row.cell for row in rows}
            given.setdefault(name, []).extend(
                (item.cell, item.document, item.decode_s) for item in samples if item.cell in known
            )

        monkeypatch.setattr(f"bench.report.sections.{name}", noted)
    rows = [item.model_copy(update={"n": 2}) for item in ROWS if item.cell == "mix-512"]
    a = make_run(tmp_path / "a", rows, [{**item, "decode_s": 1.0} for item in SAMPLES])
    b = make_run(tmp_path / "b", rows, [{**item, "decode_s": 3.0} for item in SAMPLES])
    page = page_of(a, b)
    of = [
        (f"{run}: mix-512", document, seconds) for run, seconds in (("a", 1.0), ("b", 3.0)) for document in ("d0", "d1")
    ]
    assert given == {"share_figure": of, "oq_figure": of}
    assert "not in the figures" not in page.html
    # A document that the results are without.
    given.clear()
    more = make_run(tmp_path / "more", rows, [*SAMPLES, sample("mix-512", "d2", oq_ratios=[0.1, 0.1])])
    page = page_of(more)
    assert given == {"share_figure": [], "oq_figure": []}
    assert "not in the figures that are made of samples" in page.html
    # Times of fewer documents than the row's are not the row's.
    given.clear()
    page_of(make_run(tmp_path / "times", [item.model_copy(update={"timed_documents": 1}) for item in rows]))
    assert given["share_figure"] == []
    assert len(given["oq_figure"]) == 2


@pytest.mark.slow
def test_figures_are_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run), "--html", str(tmp_path / "page.html"), "--figures", str(tmp_path / "figures")])
    assert ended.value.code == 0
    assert "wrote 4 figures" in capsys.readouterr().out
    starts = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
    files = sorted((tmp_path / "figures").iterdir())
    assert len(files) == 12
    assert all(file.read_bytes().startswith(starts[file.suffix]) for file in files)
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--html", "run/record.json/page.html"], "cannot be written"),
        (["--html", "page.html", "--against", "published.csv"], "leave it out"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(make_run(tmp_path / "run")), *arguments])
    assert ended.value.code != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


# --- Colours ---


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_aa_in_both_themes(plain: Page) -> None:
    html = plain.html
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", html, re.S)]
    assert len(themes) == 2
    for theme in themes:
        for name, colour in theme.items():
            if name in ("text", "quiet", "link") or name.startswith("series"):
                assert contrast(colour, theme["page"]) >= 4.5, name
        for ground in ("shade", "warn", "mark"):
            assert contrast(theme["text"], theme[ground]) >= 4.5
    # The files have the page's light colours.
    assert [themes[0][f"series-{number}"] for number in range(1, COLOURS + 1)] == list(SERIES)
    assert themes[0]["text"] == FOREGROUND


# --- In a browser ---


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    program = chromium()
    file = tmp_path / "page.html"
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b"), make_speed(tmp_path / "speed")]
    file.write_text(page_of(*runs, make_maps(tmp_path / "look")).html)
    column = "Array.from(document.querySelector('.sortable tbody').rows, row => row.cells[3].dataset.order)"
    press = "document.querySelectorAll('th button')[3].click()"
    with Browser(program, tmp_path / "profile") as browser:
        for width in (390, 1400):
            for dark in (False, True):
                browser.open(file, width=width, dark=dark)
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                assert browser.evaluate(
                    "Array.from(document.querySelectorAll('figure svg'), svg => svg.getBoundingClientRect())"
                    ".every(box => box.width > 250 && box.height > 100 && box.right <= innerWidth)"
                )
                ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        # On paper (A4 upright, in pixels) nothing is cut.
        browser.open(file, width=718)
        browser.call("Emulation.setEmulatedMedia", media="print")
        edges = "Array.from(document.querySelectorAll('table'), item => item.getBoundingClientRect().right)"
        assert max(browser.evaluate(edges)) <= 718
        browser.call("Emulation.setEmulatedMedia", media="")
        browser.open(file, width=1400)
        before = browser.evaluate(column)
        browser.evaluate(press)
        rising = browser.evaluate(column)
        assert [float(value) for value in rising] == sorted(float(value) for value in before) != before
        browser.evaluate(press)
        assert browser.evaluate(column) == sorted(before, key=float, reverse=True)
        assert browser.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"
        browser.evaluate(press)
        assert browser.evaluate(column) == before
        methods = {event["method"] for event in browser.events}
        assert not methods & {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
        requested = {
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        }
        assert requested == {file.as_uri()}
