"""A look inside a cache: that every number is the cache's own, and that no text breaks out of the page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arkv import CacheConfig, TriStateCache
from bench.cli import main
from bench.engine.inspect import (
    Inspection,
    inspect_prompt,
    read_maps,
    states_map,
    token_pieces,
    words,
)
from bench.errors import UserError
from bench.extend import Method, keep_tokens
from bench.methods.grid import OwnMethod, grid, tristate_cell
from bench.methods.reading import record
from bench.methods.states import EVICTED, ORIGINAL, QUANTIZED, state_codes
from bench.records.finished import read_runs
from bench.report.inspection import layer_table, print_inspection, to_html
from bench.report.page import build
from tests.bench.report.test_page import Parsed

CONFIG = CacheConfig.for_method("mix", cache_size=64, window_size=8, quant_format="int8")
TEXT = 'The old farmer bought a basket of apples near the river on Monday. <b>I will ask</b> & "you" 0 1 2. ' * 6


def look(tiny: Any, text: str = TEXT, config: CacheConfig = CONFIG, **more: Any) -> Inspection:
    ids = tiny.tokenizer(text)["input_ids"]
    names = {"model": "tiny", "source": "a text", "label": "mix"}
    return inspect_prompt(
        tiny.model, tiny.tokenizer, tristate_cell("mix", config), ids, **{"steps": 3, "names": names, **more}
    )


@pytest.fixture(scope="module")
def found(tiny: Any) -> Inspection:
    return look(tiny, continuation=(5, 6, 7, 8))


def test_states_are_those_that_the_cache_counts(tiny: Any) -> None:
    ids = tiny.tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        (prompt,) = record(tiny.model, [ids], 8)
        cache = TriStateCache.from_prefill(prompt.cache, CONFIG)
    codes = torch.stack(list((state_codes(cache) or {}).values()))
    assert codes.shape == (2, 2, len(ids))
    counts = cache.token_counts()
    for name, code in (("original", ORIGINAL), ("quantized", QUANTIZED), ("evicted", EVICTED)):
        assert float((codes == code).sum(dim=-1).float().mean()) == pytest.approx(counts[name])
    assert bool((codes[..., -8:] == ORIGINAL).all()), "the window"


def test_layers_have_the_ratios_and_slots_of_the_cache(tiny: Any, found: Inspection) -> None:
    ids = tiny.tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        (prompt,) = record(tiny.model, [ids], 8)
        cache = TriStateCache.from_prefill(prompt.cache, CONFIG)
    assert [item.oq_ratio for item in found.statistics] == pytest.approx(cache.oq_ratios(), rel=1e-5)
    for place, item in enumerate(found.statistics):
        assert item.original_slots + item.quantized_slots == 64 - 8
        held = (found.states[place] == QUANTIZED).sum(dim=-1)
        assert held.tolist() == [item.quantized_slots] * 2
        assert min(item.entropy, item.variance, item.kurtosis) > 0


def test_steps_add_up(found: Inspection) -> None:
    assert len(found.steps) == 3
    prompt = found.prompt_tokens
    for number, step in enumerate(found.steps, start=1):
        for place in range(2):
            assert step.original[place] + step.quantized[place] + step.evicted[place] == prompt + number
            # The budget is full: what comes in pushes out as much.
            assert step.lost[place] == 1.0
    quantized = [float((found.states[place] == QUANTIZED).sum()) / 2 for place in range(2)]
    for place in range(2):
        # What became Quantized took the place of a Quantized token that was evicted.
        assert found.steps[-1].quantized[place] == quantized[place]
    assert sum(count for _, count in found.steps[0].most_lost) > 0


def test_a_budget_that_holds_all(tiny: Any) -> None:
    roomy = look(tiny, config=CacheConfig.for_method("mix", cache_size=500, window_size=8))
    assert not roomy.compressed
    assert all(word.kept == word.original == 4 for word in words(roomy))
    assert "Nothing was compressed" in to_html(roomy)


class Newest(Method):
    name = "newest"

    def compress(self, model: Any, prompt: Any, budget: Any) -> Any:
        kept = torch.arange(prompt.tokens - budget.tokens, prompt.tokens)
        return keep_tokens(prompt, [kept for _ in prompt.layers])


def test_a_method_of_a_plugin_is_looked_into_as_well(tiny: Any) -> None:
    (cell,) = grid(["newest"], [{"cache_size": 64}], [], None, {}, {"newest": OwnMethod(Newest(), "1")})
    ids = tiny.tokenizer(TEXT)["input_ids"]
    names = {"model": "tiny", "source": "a text", "label": cell.label}
    mine = inspect_prompt(tiny.model, tiny.tokenizer, cell, ids, steps=3, continuation=(5, 6, 7), names=names)
    assert (mine.layers, mine.statistics) == ([0, 1], [])
    assert bool((mine.states[..., :-64] == EVICTED).all())
    assert bool((mine.states[..., -64:] == ORIGINAL).all())
    assert [step.original for step in mine.steps] == [[65, 65], [66, 66], [67, 67]]
    layers, changes, steps = Parsed(to_html(mine)).tables
    assert [len(table) for table in (layers, changes, steps)] == [3, 3, 4]
    assert layers[0] == ["layer", "Original", "Quantized", "Evicted"]


def test_a_cache_that_does_not_know_its_tokens_says_so(tiny: Any) -> None:
    (cell,) = grid(["kvpress:knorm"], [{"cache_size": 64}], [], None, {})
    names = {"model": "tiny", "source": "a text", "label": cell.label}
    with pytest.raises(UserError, match="kvpress:knorm: its cache does not know which tokens it holds"):
        inspect_prompt(tiny.model, tiny.tokenizer, cell, tiny.tokenizer(TEXT)["input_ids"], steps=1, names=names)


def test_words_are_the_text(tiny: Any, found: Inspection) -> None:
    assert "".join(word.text for word in words(found)) == TEXT
    assert {word.text.strip() for word in words(found)} >= {"farmer", "<b>I", "&"}
    pieces = token_pieces(tiny.tokenizer, tiny.tokenizer("naïve ☃☃ 漢字 end")["input_ids"])
    assert "".join(pieces) == "naïve ☃☃ 漢字 end"


def test_a_word_is_kept_where_all_of_it_is(found: Inspection) -> None:
    for word in words(found):
        end = word.position + next(
            count
            for count in range(1, 40)
            if "".join(found.pieces[word.position : word.position + count]) == word.text
            and (word.position + count == found.prompt_tokens or found.pieces[word.position + count])
        )
        heads = (found.states[:, :, word.position : end] != EVICTED).all(dim=-1)
        assert word.kept == int(heads.sum())


def test_shares_of_a_map() -> None:
    codes = torch.tensor([[[2, 2, 1, 0], [2, 1, 1, 0]]], dtype=torch.int8)
    states = states_map(codes, [3], bins=2)
    assert (states.original, states.quantized, states.layers) == ([[0.75, 0.0]], [[0.25, 0.5]], [3])
    assert len(states_map(codes, [3], bins=100).original[0]) == 4


def test_text_stays_text_on_the_page(found: Inspection) -> None:
    html = to_html(found)
    parsed = Parsed(html)
    assert "b" not in {tag for tag, _ in parsed.tags}
    assert "&lt;b&gt;I" in html
    assert "://" not in html
    assert len(html) < 3_000_000
    layers, changes, steps = parsed.tables
    assert [len(table) for table in (layers, changes, steps)] == [3, 3, 4]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_is_cut_in_a_narrow_terminal(found: Inspection, width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    print_inspection(found, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    _, headers, lines, _ = layer_table(found)
    words = text.split()
    assert all(cell in words for line in lines for cell in line)
    # The layer leads every part.
    heads = [line.split() for line in text.splitlines() if line.split()[:1] == ["layer"]]
    assert len(heads) == {60: 3, 80: 2, 200: 1}[width]
    assert " ".join(["layer", *(word for head in heads for word in head[1:])]) == " ".join(headers)


def command(folder: Path, *more: object) -> list[str]:
    few = ["--cache-size", "64", "--window-size", "8", "--quant-format", "int8", "--steps", "2"]
    return ["inspect", "--model", str(folder), *few, "--device", "cpu", "--dtype", "float32", *map(str, more)]


def test_a_file_in_the_terminal_and_as_files(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT + "\x1b[2J")
    with pytest.raises(SystemExit) as ended:
        main(command(tiny_folder, "--text", text, "--html", tmp_path / "a.html", "--outdir", tmp_path / "look"))
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "entropy" in said
    assert "\x1b[2J" not in said
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    details = json.loads((tmp_path / "look" / "inspect.json").read_text())
    assert [len(details["layers"]), len(details["steps"])] == [2, 2]
    page = build(read_runs([tmp_path / "look"]))
    assert len(page.figures) == 1
    assert "text, document text.txt, tiny: mix C=64 tokens per layer int8" in page.html


def test_a_document_of_a_task(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command(tiny_folder, "--task", "needle", "--doc", "1", "--lengths", "200"))
    assert ended.value.code == 0
    assert "needle, 200-" in capsys.readouterr().out


def test_a_document_of_a_run(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest one where none is named: its model, prompts and method; what is typed wins."""
    monkeypatch.chdir(tmp_path)
    grid = ["--methods", "full,origin,mix", "--cache-ratio", "0.5,0.25", "--window-size", "8,16", "--tasks", "needle"]
    data = ["--lengths", "210,250", "--samples", "2", "--device", "cpu", "--dtype", "float32", "--seed", "3"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "--model", str(tiny_folder), *grid, *data, "--outdir", "runs/mine"])
    assert ended.value.code == 0
    asked = {json.loads(line)["document"] for line in (tmp_path / "runs/mine/samples.jsonl").read_text().splitlines()}
    for named, said in ([], "the newest one, runs/mine"), (["runs/mine", "--methods", "origin"], ""):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["inspect", *named, "--doc", "3", "--steps", "2", "--outdir", f"look{len(named)}"])
        assert ended.value.code == 0
        assert said in capsys.readouterr().err
        details = json.loads((tmp_path / f"look{len(named)}" / "inspect.json").read_text())
        assert details["document"] in asked
        assert details["label"].startswith("origin" if named else "mix")
        assert "50 %" in details["label"]
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "runs/mine", "--cache-size", "40", "--steps", "2", "--outdir", "other"])
    assert json.loads((tmp_path / "other" / "inspect.json").read_text())["label"].startswith("mix C=40")


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        ([], "give --text FILE or --task NAME", 2),
        (["--text", "a", "--task", "needle"], "one of them", 2),
        (["--text", "absent.txt"], "cannot read the text absent.txt: No such file", 2),
        (["--text", "binary.txt"], "the text binary.txt is not UTF-8", 1),
        (["--text", "empty.txt"], "leaves nothing to compress", 1),
        (["--text", "long.txt"], "more than the model's context: give --tokens 510", 1),
        (["--text", "long.txt", "--tokens", "512"], "give up to 510", 2),
        (["--text", "long.txt", "--tokens", "100", "--html", "long.txt/where.html"], "cannot be written", 1),
        (["--task", "needle", "--doc", "abc", "--lengths", "200"], "--doc=abc: known: 200-d", 2),
        (["--task", "needle", "--quant-type", "full"], "give one method", 2),
        (["--task", "needle", "--cache-size", "64,128"], "at one budget", 2),
    ],
)
def test_mistakes_are_one_line(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary.txt").write_bytes(b"\xff\xfe\xfa")
    Path("empty.txt").write_text("")
    Path("long.txt").write_text(TEXT * 10)
    with pytest.raises(SystemExit) as ended:
        main(command(tiny_folder, *arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, said in line) == (status, True), line


def test_damaged_maps_are_one_line(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"maps": [{"map": {}}]}'):
        (tmp_path / "states.json").write_text(content)
        with pytest.raises(UserError, match=r"states\.json is not a file of states maps"):
            read_maps(tmp_path)
