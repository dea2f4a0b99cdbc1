"""The viewer of documents and answers: what it holds, and what a person does with it in a browser."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from bench.records.document import Part, Prompt, prompt_line
from bench.records.finished import read_runs
from bench.report import viewer
from bench.report.columns import EVERYTHING
from bench.report.looks import COLOURED, COLOURS, SHARED, colour_of
from bench.report.page import build
from bench.report.viewer import safe_json, viewer_of
from tests.bench.browser import Browser, chromium
from tests.bench.report.test_page import HOSTILE, make_run, sample
from tests.bench.report.test_report import row

CELLS = {"full-None": "full", "mix-512": "mix", "window-512": "window"}


def answered(document: str, cell: str, score: float, text: str, ids: list[int], **more: Any) -> dict[str, Any]:
    texts = [f"{word} " for word in text.split(" ")][: len(ids)]
    size = None if cell == "full-None" else 512
    values = {"score": score, "scores": {"exact_match": score}, "text": text, "token_ids": ids, "token_texts": texts}
    return sample(cell, document, cache_size=size, **values, **more)


def made(folder: Path, documents: int = 4, *, prompts: bool = True, context: str = "a long text", **more: Any) -> Path:
    """A run in which ``mix`` fails in every second document and ``window`` in all."""
    lines = []
    for number in range(documents):
        name, info = f"d{number}", {"length": 1000 * (1 + number % 2), "depth": 0.5 * (number % 3)}
        facts: dict[str, Any] = {"reference": f"{number}42", "info": info, **more}
        right = f"it is {number}42"
        lines += [
            answered(name, "full-None", 1.0, right, [1, 2, 3], **facts),
            answered(name, "mix-512", float(number % 2), right if number % 2 else "it was nothing", [1, 2, 3], **facts)
            if number % 2
            else answered(name, "mix-512", 0.0, "it was nothing", [1, 7, 8], **facts),
            answered(name, "window-512", 0.0, HOSTILE, [9], **facts),
        ]
    rows = [row(method, 1.0, None if method == "full" else 512, cell=cell) for cell, method in CELLS.items()]
    run = make_run(folder, [item.model_copy(update={"n": documents}) for item in rows], lines)
    if prompts:
        asked = [
            Prompt(
                model="tiny",
                task="needle",
                document=f"d{number}",
                prompt_sha256=f"hash of d{number}",
                parts=(Part(role="context", text=f"{context} {number}"), Part(role="question", text="which number?")),
            )
            for number in range(documents)
        ]
        (run / "documents.jsonl").write_text("".join(f"{prompt_line(item)}\n" for item in asked))
    return run


def held(run: Path, beside: Path | None = None) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    found = viewer_of(read_runs([run]), beside)
    assert found is not None
    return json.loads(found.index), [json.loads(text) for text in found.chunks]


def test_every_document_has_its_prompt_and_all_answers(tmp_path: Path) -> None:
    index, chunks = held(made(tmp_path / "run"))
    assert index["tasks"] == [{"model": "tiny", "task": "needle", "sign": 1}]
    assert [cell["label"] for cell in index["cells"]] == ["full", "window 512", "mix 512"]
    assert [document[1] for document in index["documents"]] == ["d0", "d1", "d2", "d3"]
    _, _, tokens, facts, scores, differs, (chunk, place) = index["documents"][0]
    assert (tokens, facts, scores) == (100, [1000, 0.0], [1.0, 0.0, 0.0])
    # The first token that is another one than full's: none of full itself.
    assert differs == [None, 0, 1]
    assert index["documents"][1][5] == [None, 0, -1]
    entry = chunks[chunk][place]
    assert [part["role"] for part in entry["parts"]] == ["context", "question"]
    assert entry["reference"] == "042"
    assert [answer["text"] for answer in entry["answers"]] == ["it is 042", HOSTILE, "it was nothing"]


def test_costs_are_written_as_in_the_tables(tmp_path: Path) -> None:
    run = read_runs([made(tmp_path / "run", 1, ttft_ms=1234.0, tpot_ms=45.67, kv_bytes=4_000, full_kv_bytes=16_000)])
    found = viewer_of(run)
    assert found is not None
    costs = json.loads(found.chunks[0])[0]["answers"][1]["costs"]
    assert costs == ["4.0 kB, 25.0 % of full", "TTFT 1.23 s", "TPOT 45.7 ms"]
    timed = row("window", 0.5, ttft_ms=1234.0, tpot_ms=45.67, kv_bytes_mean=4_000.0, kv_share=0.25)
    cells = {column.header: column.cell(timed) for column in EVERYTHING}
    table = [f"{cells['KV bytes']}, {cells['KV of full']} of full", f"TTFT {cells['TTFT s']} s"]
    assert [*table, f"TPOT {cells['TPOT ms']} ms"] == costs


def test_without_prompts_it_says_so(tmp_path: Path) -> None:
    _, ((first, *_),) = held(made(tmp_path / "run", prompts=False))
    assert first["parts"] is None
    assert len(first["answers"]) == 3


def test_two_runs_answer_one_document_side_by_side(tmp_path: Path) -> None:
    found = viewer_of(read_runs([made(tmp_path / "a"), made(tmp_path / "b", prompts=False)]))
    assert found is not None
    index = json.loads(found.index)
    assert len(index["documents"]) == 4
    assert [cell["label"] for cell in index["cells"]][:2] == ["full a", "full b"]
    # Each is compared with the full cache of its own run.
    assert index["documents"][0][5] == [None, None, 0, 0, 1, 1]
    assert json.loads(found.chunks[0])[0]["parts"] is not None


def test_repeats_are_one_document(tmp_path: Path) -> None:
    lines = [
        {**sample("full-None", name, score=score, repeat=repeat), "prompt_sha256": f"seed {repeat}"}
        for name, repeat, score in (("d0", 1, 1.0), ("d0~2", 2, 0.0))
    ]
    index, chunks = held(make_run(tmp_path / "run", [row("full", 0.5)], lines))
    assert [document[4] for document in index["documents"]] == [[0.5]]
    assert [answer["repeat"] for answer in chunks[0][0]["answers"]] == [1, 2]


def test_what_is_too_much_for_a_page_stands_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "CHUNK", 2_000)
    monkeypatch.setattr(viewer, "INLINE", 4_000)
    run = made(tmp_path / "run", 12, context="word " * 100)
    index, chunks = held(run, tmp_path / "page.samples")
    assert chunks == []
    assert index["beside"] == "page.samples"
    files = sorted((tmp_path / "page.samples").iterdir(), key=lambda file: int(file.stem))
    assert [file.name for file in files] == [f"{number}.js" for number in range(index["chunks"])]
    entries = [json.loads(file.read_text().partition(",")[2].rstrip(");\n")) for file in files]
    for document in index["documents"]:
        chunk, place = document[6]
        assert entries[chunk][place]["parts"][0]["text"].endswith(document[1].removeprefix("d"))
    # Without a folder all of it is in the page.
    assert len(held(run)[1]) == index["chunks"]


@pytest.mark.parametrize("text", ["</script><img src=x>", "\u2028", HOSTILE])
def test_json_cannot_end_its_element(text: str) -> None:
    written = safe_json({text: [text]})
    assert "<" not in written
    assert "\u2028" not in written
    assert json.loads(written) == {text: [text]}


def test_a_method_has_one_colour() -> None:
    assert colour_of("full") == 0
    assert [colour_of(method) for method in COLOURED] == list(range(1, len(COLOURED) + 1))
    others = ["kvpress:tova", "kvpress:keydiff", "hf:fp8", "mix-published", "origin-published", "mine"]
    assert all(COLOURS - SHARED < colour_of(method) <= COLOURS for method in others)
    # What the records stand beside each other.
    assert len({colour_of(f"{method}-published") for method in ("origin", "quant", "mix")}) == 3


@pytest.mark.slow
def test_a_person_looks_for_what_went_wrong(tmp_path: Path) -> None:
    program = chromium()
    file = tmp_path / "page.html"
    compared = {"kl": [0.1, 2.0], "agrees": [True, False], "delta_nll": [0.1, 2.0]}
    run = made(tmp_path / "run", 120)
    with open(run / "samples.jsonl", "a") as samples:
        for cell in ("full-None", "mix-512"):
            nothing = {"text": None, "token_ids": None, "cache_size": 512 if cell == "mix-512" else None}
            samples.write(json.dumps(sample(cell, "kl", task="fidelity", compared=compared, **nothing)) + "\n")
    file.write_text(build(read_runs([run])).html)
    ids = "Array.from(document.querySelectorAll('#viewer tbody button'), item => item.textContent)"
    choose = (
        "(() => {{ const item = document.querySelector('[name={0}]'); item.value = '{1}';"
        "item.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )
    title = "document.querySelector('#document h3')?.textContent"
    with Browser(program, tmp_path / "profile") as browser:
        for width, dark in ((390, False), (390, True), (1400, False), (1400, True)):
            browser.open(file, width=width, dark=dark)
            assert browser.evaluate(f"{ids}.length") == 50
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            browser.evaluate("document.querySelector('#viewer tbody button').click()")
            browser.wait("document.querySelectorAll('.answers > div').length === 3")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            sides = "Array.from(document.querySelectorAll('.answers > div'), item => item.getBoundingClientRect().left)"
            assert len(set(browser.evaluate(sides))) == (3 if width > 1000 else 1)
        # What went wrong: the first token that differs is marked, and the text of a model stays text.
        marks = "Array.from(document.querySelectorAll('#document mark'), item => item.textContent.trim())"
        assert browser.evaluate(marks) == [HOSTILE.split(" ")[0], "was"]
        assert browser.evaluate("document.querySelectorAll('#samples img').length") == 0
        assert "which number?" in browser.evaluate("document.querySelector('#document details[open]').textContent")
        assert not browser.evaluate("document.querySelector('#document details').open")
        # Keys: next, back, search.
        browser.press("j")
        browser.wait(f"{title} === 'd1'")
        browser.press("k")
        browser.wait(f"{title} === 'd0'")
        browser.press("Escape")
        assert browser.evaluate("document.activeElement.textContent") == "d0"
        browser.press("j")
        browser.press("Enter")
        browser.wait(f"{title} === 'd1'")
        browser.press("Escape")
        # Filters.
        wrong = browser.evaluate("Array.from(document.querySelector('[name=outcome]').options, o => o.textContent)")
        assert "full right, mix 512 wrong" in wrong
        browser.evaluate(choose.format("outcome", "worse 2"))
        browser.wait("document.getElementById('count').textContent.startsWith('60 of 121')")
        assert browser.evaluate(ids)[:3] == ["d0", "d2", "d4"]
        browser.evaluate("document.querySelector('[name=after]').click()")
        assert browser.evaluate(f"{ids}.length") == 10
        browser.evaluate(choose.format("depth", "0"))
        browser.wait("document.getElementById('count').textContent.startsWith('20 of 121')")
        browser.evaluate(choose.format("outcome", ""))
        browser.evaluate(choose.format("depth", ""))
        browser.press("/")
        browser.call("Input.insertText", text="1742")
        browser.wait("document.getElementById('count').textContent.startsWith('2 of 121')")
        assert browser.evaluate(ids) == ["d17", "d117"]
        # Divergences, token by token.
        browser.evaluate(choose.format("text", ""))
        browser.evaluate(choose.format("task", "1"))
        browser.wait("document.getElementById('count').textContent.startsWith('1 of 121')")
        browser.evaluate("document.querySelector('#viewer tbody button').click()")
        browser.wait("document.querySelectorAll('.kl span').length === 4")
        assert "KL 2 nats, another token" in browser.evaluate("document.querySelectorAll('.kl span')[1].title")
        assert "The prompt was not stored" in browser.evaluate("document.querySelector('.missing').textContent")
        # On paper there is nothing to press.
        browser.call("Emulation.setEmulatedMedia", media="print")
        assert browser.evaluate("getComputedStyle(document.querySelector('#document nav')).display") == "none"
        methods = {event["method"] for event in browser.events}
        assert not methods & {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}


@pytest.mark.slow
def test_scores_are_in_sight_on_a_phone_and_on_paper(tmp_path: Path) -> None:
    """However long the names of tasks and methods are, and however many cells there are."""
    program = chromium()
    edges = "Array.from(document.querySelector('#viewer tbody tr').cells, cell => cell.getBoundingClientRect().right)"
    with Browser(program, tmp_path / "profile") as browser:
        for cells, standing in ((8, {"595 841"}), (24, {"595 841", "841 595"})):
            lines = [
                sample(f"mix-{size}", "1024-0", task=task, cache_size=size, method="kvpress:kvzip+quanto-int4")
                for task in ("ruler:niah_multikey_2 (question after)", "ruler:vt (question after)")
                for size in range(100, 100 + cells)
            ]
            run = make_run(tmp_path / f"run-{cells}", [row("mix", 0.5, 100, cell="mix-100")], lines)
            file = tmp_path / f"{cells}.html"
            file.write_text(build(read_runs([run])).html)
            browser.open(file, width=390)
            # The document, its tokens, then scores: some of them can be seen without a finger.
            assert sum(edge < 390 for edge in browser.evaluate(edges)) >= 6
            assert "ruler:vt" in browser.evaluate("document.querySelector('#viewer tbody').textContent")
            browser.open(file, width=700 if cells < 14 else 1000)
            browser.call("Emulation.setEmulatedMedia", media="print")
            assert max(browser.evaluate(edges)) <= browser.evaluate("document.documentElement.clientWidth")
            paper = base64.b64decode(browser.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
            boxes = re.findall(rb"MediaBox \[0 0 (\d+)[.\d]* (\d+)", paper)
            assert {f"{wide.decode()} {high.decode()}" for wide, high in boxes} == standing
            browser.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.slow
def test_ten_thousand_samples_open_at_once(tmp_path: Path) -> None:
    program = chromium()
    run = made(tmp_path / "run", 3334, context="words of a context " * 20)
    file = tmp_path / "page.html"
    file.write_text(build(read_runs([run]), file.with_suffix(".samples")).html)
    assert file.stat().st_size < 2_000_000
    assert list((tmp_path / "page.samples").iterdir())
    with Browser(program, tmp_path / "profile") as browser:
        begin = time.monotonic()
        browser.open(file, width=1400)
        browser.wait("document.getElementById('count')?.textContent === '3334 of 3334 documents.'")
        browser.call("Page.captureScreenshot")
        assert time.monotonic() - begin < 2
        # What is opened comes from its file.
        browser.evaluate("document.querySelectorAll('#viewer tbody button')[40].click()")
        browser.wait("document.querySelectorAll('.answers > div').length === 3")
        assert "words of a context" in browser.evaluate("document.querySelector('#document details').textContent")
        browser.press("Escape")
        browser.press("/")
        browser.call("Input.insertText", text="333342")
        browser.wait("document.getElementById('count').textContent.startsWith('1 of 3334')")
        methods = {event["method"] for event in browser.events}
        assert not methods & {"Log.entryAdded", "Runtime.exceptionThrown"}
        (tmp_path / "page.samples").rename(tmp_path / "elsewhere")
        browser.open(file, width=1400)
        browser.evaluate("document.querySelector('#viewer tbody button').click()")
        browser.wait("document.querySelector('#document').textContent.includes('is not beside this page')")
