"""Whole runs on a tiny model: what a run leaves, and what it does not do twice."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from bench.engine.engine import Engine
from bench.engine.inspect import read_maps
from bench.errors import UserError
from bench.methods.grid import Cell
from bench.names import CURVE, DOCUMENTS, RECORD, RESULTS, SAMPLES, STATES
from bench.records.document import Prompts
from bench.records.samples import Samples
from bench.runs import asked
from bench.runs.executors import base
from bench.runs.folder import RunFolder
from bench.runs.run import Outcome, execute
from bench.settings.run import RunConfig
from tasks.base import Task, TaskGroup
from tests.bench.conftest import SENTENCES, define_toys, read_lines
from tests.bench.lines import recorded

WANTED = [
    *["model", "task", "metric", "method", "quant_format", "budget_unit", "cache_size", "window_size", "n"],
    *["score", "score_full", "retention", "kv_bytes_mean", "kv_bytes_peak", "kv_share", "kv_share_of_prompt"],
    *["original_share", "quantized_share", "evicted_share", "prefill_s", "ttft_ms", "decode_tokens_per_s", "tpot_ms"],
    *["peak_memory_bytes", "prompt_tokens", "generated_tokens"],
]


def go(folder: Path, path: Path, *, fresh: bool = False, **settings: Any) -> tuple[Outcome, str]:
    """A run, and what it said."""
    defaults: dict[str, Any] = {
        "model": (str(folder),),
        "quant_type": ("full", "window", "mix"),
        "cache_size": (64,),
        "window_size": (8,),
        "quant_format": ("int8",),
        "lengths": (250,),
        "samples": 3,
        "device": "cpu",
        "dtype": "float32",
        "question": "before",
    }
    console = Console(file=io.StringIO(), width=200)
    outcome = execute(RunConfig(**{**defaults, **settings}), path, console, fresh=fresh)
    return outcome, console.file.getvalue()  # type: ignore[attr-defined]


def test_documents_that_cannot_tell_the_rows_apart_are_named_with_how_many_could() -> None:
    task = asked.make_task("needle")
    assert isinstance(task, Task)
    methods = ["full", *["mix"] * 13]
    config = RunConfig(lengths=(300, 400))
    said = asked.doubts(config, task, 7, methods)
    assert "7 documents cannot tell 13 rows from full (none, whatever they score); 17" in said
    assert said.endswith(": --samples 20")  # of 8 now
    assert asked.doubts(RunConfig(samples=2), task, 4, methods).endswith("; 5 give intervals: --samples 3")
    assert asked.doubts(RunConfig(limit=4), task, 4, methods).endswith("; 5 give intervals: --limit 5")
    assert asked.doubts(RunConfig(limit=4, samples=2, lengths=(300,)), task, 4, methods).endswith(
        ": --limit 5 --samples 5"
    )
    assert asked.doubts(config, task, 17, methods) == ""
    # What KL scatters by is not known before it is measured.
    fidelity = asked.make_task("fidelity")
    assert isinstance(fidelity, Task)
    assert asked.doubts(config, fidelity, 8, methods) == ""
    assert "no interval" in asked.doubts(config, fidelity, 4, methods)
    # Of given documents there are no more.
    trec = asked.make_task("longbench:trec")
    assert isinstance(trec, TaskGroup)
    assert asked.doubts(config, trec.tasks()[0], 4, methods).endswith("; 5 give intervals")


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "done"
    outcome, said = go(tiny_folder, path)
    assert outcome.measured == 9
    assert said.index("needle: 3 documents give no interval and no verdict") < said.index("tiny needle: 1/9 answers")
    assert "9/9 answers" in said
    return path


def test_one_line_per_document_and_method(done: Path) -> None:
    lines = read_lines(done / SAMPLES)
    # Turned by one place from document to document.
    turned = ["full", "window", "mix", "window", "mix", "full", "mix", "full", "window"]
    assert [line["method"] for line in lines] == turned
    for line in lines:
        assert {"text", "score", "prefill_s", "ttft_ms", "decode_s", "kv_bytes", "reference"} <= set(line)
        states = [line[f"tokens_{state}"] for state in ("original", "quantized", "evicted")]
        assert sum(states) == pytest.approx(line["tokens_seen"])
        assert line["tokens_seen"] == line["prompt_tokens"] + line["generated_tokens"] - 1
        assert (states[2] > 0) == (line["method"] != "full")


def test_each_prompt_is_kept_once(done: Path) -> None:
    samples, prompts = Samples(done / SAMPLES), Prompts(done / DOCUMENTS)
    assert {(item.model, item.task, item.document, item.prompt_sha256) for item in samples.values()} == set(prompts)
    assert [[part.role for part in prompt.parts] for prompt in prompts.values()] == [["context"]] * 3
    assert all(len(item.token_texts or ()) == item.generated_tokens for item in samples.whole(samples.values()))


def test_the_table_has_the_columns_promised(done: Path) -> None:
    with open(done / RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(WANTED) <= set(rows[0])
    full, window, mix = rows
    assert [row["method"] for row in rows] == ["full", "window", "mix"]
    assert full["cache_size"] == full["budget_unit"] == full["quant_format"] == ""
    assert (mix["quant_format"], window["quant_format"], mix["cache_size"]) == ("int8", "", "64")
    assert (full["kv_share"], full["n"]) == ("1", "3")
    assert float(mix["kv_share"]) < 0.4 > float(window["kv_share"])
    assert {row["peak_memory_bytes"] for row in rows} == {""}, "unknown on a CPU, so empty"
    shares = [sum(float(row[f"{state}_share"]) for state in ("original", "quantized", "evicted")) for row in rows]
    assert shares == pytest.approx([1, 1, 1], abs=1e-4)


def test_the_record_explains_the_run(done: Path) -> None:
    record = recorded(done)
    assert record["finished"] >= record["started"]
    assert record["settings"]["cache_size"] == [64]
    assert len(record["models"]["tiny"]["fingerprint"]) == 64
    assert {"commit", "dirty", "python", "packages", "hardware", "command"} <= set(record)
    assert record["packages"]["torch"]
    assert record["tasks"]["needle"] == {
        "documents": 3,
        "truncated": 0,
        "data_sha256": None,
        "higher_is_better": True,
    }


def test_continuing_measures_nothing_twice(done: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (done / SAMPLES).read_bytes()
    table = (done / RESULTS).read_bytes()
    outcome, said = go(tiny_folder, done)
    assert outcome.measured == 0
    assert "9 of 9 answers are in" in said
    assert ((done / SAMPLES).read_bytes(), (done / RESULTS).read_bytes()) == (before, table)
    # Another method needs its own answers and no others.
    outcome, _ = go(tiny_folder, done, quant_type=("full", "origin"))
    assert outcome.measured == 3
    lines = read_lines(done / SAMPLES)
    assert len(lines) == len({(line["document"], line["cell"]) for line in lines}) == 12
    (done / SAMPLES).write_bytes(before)
    (done / RESULTS).write_bytes(table)


def test_where_nothing_is_left_no_model_is_loaded(
    done: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def refuses(reference: str, **_: Any) -> Any:
        loaded.append(reference)
        raise UserError("not now")

    before = recorded(done)["models"]
    monkeypatch.setattr(base, "load", refuses)
    outcome, _ = go(tiny_folder, done)
    assert (outcome.measured, outcome.failures, loaded) == (0, [], [])
    assert recorded(done)["models"] == before
    assert before["tiny"]["warm_up"]
    with pytest.raises(UserError, match="not now"):
        go(tiny_folder, done, quant_type=("full", "quant"))
    assert len(loaded) == 1


def test_two_runs_on_one_folder(done: Path, tiny_folder: Path) -> None:
    with RunFolder(done, recorded(done)["fingerprint"]):
        before = (done / SAMPLES).read_bytes()
        for fresh in (False, True):
            with pytest.raises(UserError, match="another run writes here"):
                go(tiny_folder, done, fresh=fresh)
        assert (done / SAMPLES).read_bytes() == before


def test_other_settings_need_another_folder(done: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="other settings: seed is 0 there and 1 here"):
        go(tiny_folder, done, seed=1)


def test_nothing_is_touched_when_the_question_makes_no_sense(done: Path, tiny_folder: Path) -> None:
    files = {name: (done / name).read_bytes() for name in (SAMPLES, RECORD, RESULTS)}
    for settings in (
        {"quant_type": ("mixx",)},
        {"tasks": ("needl",)},
        {"model": ("nowhere/",)},
        {"window_size": (64,)},
    ):
        with pytest.raises((UserError, ValueError)):
            go(tiny_folder, done, fresh=True, **settings)
    assert files == {name: (done / name).read_bytes() for name in files}


def test_a_failed_task_leaves_the_others_alone(tiny_folder: Path, tmp_path: Path) -> None:
    outcome, said = go(tiny_folder, tmp_path, tasks=("gsm8k", "needle"), data_dir=tmp_path / "nowhere", samples=1)
    assert [failure["task"] for failure in outcome.failures] == ["gsm8k"]
    assert str(tmp_path / "nowhere") in said.replace("\n", "")
    assert len(outcome.rows) == 3
    assert recorded(tmp_path)["failures"] == outcome.failures


def test_an_unknown_task_leaves_the_others_alone(tiny_folder: Path, tmp_path: Path) -> None:
    """Like one without data, or with a row that lacks a field; all are tried again."""
    settings = toys(tmp_path / "toys")
    data = settings["data_dir"]
    rows = (data / "toy_text/test.jsonl").read_text()
    (data / "toy_text/test.jsonl").write_text("{}\n")
    settings |= {"tasks": ("toy_wset", "gsm8k", "toy_text", "toy_west", "longbench:trecc"), "quant_type": ("full",)}
    outcome, said = go(tiny_folder, tmp_path / "run", **settings)
    errors = {failure["task"]: failure["error"] for failure in outcome.failures}
    assert list(errors) == ["toy_wset", "longbench:trecc", "gsm8k", "toy_text"]
    assert "did you mean toy_west" in errors["toy_wset"]
    assert "did you mean trec" in errors["longbench:trecc"]
    assert str(data / "gsm8k/test.jsonl") in errors["gsm8k"]
    assert "line 1: " in errors["toy_text"]
    assert "toy_wset: unknown task 'toy_wset'" in said
    assert {row.task for row in outcome.rows} == {"toy_west"}
    assert recorded(tmp_path / "run")["failures"] == outcome.failures
    (data / "toy_text/test.jsonl").write_text(rows)
    outcome, _ = go(tiny_folder, tmp_path / "run", **settings)
    assert [failure["task"] for failure in outcome.failures] == ["toy_wset", "longbench:trecc", "gsm8k"]
    assert {row.task for row in outcome.rows} == {"toy_west", "toy_text"}


def test_a_failed_cell_leaves_the_others_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Engine.compress

    def failing(self: Engine, cell: Cell, *arguments: Any) -> Any:
        if cell.method == "window":
            raise UserError("no window today")
        return original(self, cell, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "compress", failing)
        outcome, said = go(tiny_folder, tmp_path)
    assert outcome.measured == 6
    assert [row.method for row in outcome.rows] == ["full", "mix"]
    assert len(outcome.failures) == 3
    first = outcome.failures[0]
    assert (first["model"], first["task"], first["error"]) == ("tiny", "needle", "no window today")
    assert first["cell"].startswith("window-C64t")
    assert f"{first['cell']}, {first['document']} and 2 more documents: no window today" in said
    assert recorded(tmp_path)["failures"] == outcome.failures
    # The same command tries again what has failed.
    outcome, _ = go(tiny_folder, tmp_path)
    assert (outcome.measured, outcome.failures) == (3, [])


def test_a_prompt_within_the_budget_is_no_error(tiny_folder: Path, tmp_path: Path) -> None:
    outcome, _ = go(tiny_folder, tmp_path, cache_size=(300,), samples=1)
    _full, *others = outcome.rows
    assert [row.compressed_documents for row in others] == [0, 0]
    assert len({row.score for row in outcome.rows}) == 1
    texts = {line["text"] for line in read_lines(tmp_path / SAMPLES)}
    assert len(texts) == 1


def test_an_unknown_task_of_lm_eval_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'gsm8'"):
        asked.make_task("gsm8")


def toys(folder: Path) -> dict[str, Any]:
    """Settings of a run of the toy tasks."""
    tasks, data = define_toys(folder)
    return {"tasks": ("toys",), "include_path": (str(tasks),), "data_dir": data, "cache_ratio": (0.25,)}


@pytest.fixture(scope="module")
def toy_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Outcome]:
    """A run of the toy tasks one document at a time: its folder, its settings and what it found."""
    path = tmp_path_factory.mktemp("toys")
    settings = toys(path / "toys")
    return path / "run", settings, go(tiny_folder, path / "run", **settings)[0]


def test_a_group_has_rows_for_its_tasks_and_itself(toy_run: tuple[Path, dict[str, Any], Outcome]) -> None:
    path, _, outcome = toy_run
    accuracy = [row for row in outcome.rows if row.metric == "acc,none" and row.method == "mix"]
    assert [(row.task, row.part_of, row.n) for row in accuracy] == [
        ("toy_east", "toys", 3),
        ("toy_west", "toys", 5),
        ("toys", None, 8),
    ]
    east, west, both = (row.score for row in accuracy)
    assert both == pytest.approx((3 * east + 5 * west) / 8)
    for row in outcome.rows:
        compressed = row.method != "full"
        assert (row.compressed_documents > 0) == compressed
        assert (row.evicted_share > 0.3) == compressed
        assert row.ttft_ms is row.tpot_ms is row.decode_tokens_per_s is None
        assert row.score_full is not None
    full, *others = [line["log_likelihoods"] for line in read_lines(path / SAMPLES)[:3]]
    assert all(other != full for other in others)


def test_fidelity_is_a_task_like_others(tiny_folder: Path, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt")
    settings = {"tasks": ("fidelity",), "text": text, "lengths": (120,), "continuation": 8, "samples": 2}
    outcome, _ = go(tiny_folder, tmp_path, **settings)
    scores = {(row.metric, row.method): row.score for row in outcome.rows}
    assert {metric for metric, _ in scores} == {"kl", "kl_p95", "top1_agreement", "delta_nll"}
    assert scores["kl", "full"] == scores["kl_p95", "full"] == scores["delta_nll", "full"] == 0
    assert scores["top1_agreement", "full"] == 1
    assert 0 < scores["kl", "mix"] < scores["kl_p95", "mix"]
    table = (tmp_path / RESULTS).read_bytes()
    outcome, _ = go(tiny_folder, tmp_path, **settings)
    assert outcome.measured == 0
    assert (tmp_path / RESULTS).read_bytes() == table, "what the samples hold is enough"


def a_text(path: Path) -> Path:
    """A text of some hundred tokens: that of Python takes a second to tokenize."""
    path.write_text(" ".join(SENTENCES * 10))
    return path


def test_layers_are_compared_on_request(tiny_folder: Path, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt")
    settings = {"tasks": ("fidelity",), "text": text, "lengths": (120,), "continuation": 8, "samples": 2}
    assert go(tiny_folder, tmp_path, **settings)[0].measured == 6
    # What has been measured without cannot answer the same with.
    outcome, _ = go(tiny_folder, tmp_path, **settings, per_layer=True)
    assert outcome.measured == 6
    scores = {row.method: row.score for row in outcome.rows if row.metric == "attention_error"}
    lines = read_lines(tmp_path / SAMPLES)[6:]
    errors = [line["compared"]["attention_error"] for line in lines if line["method"] == "mix"]
    assert {len(layers) for layers in errors} == {2}
    assert scores["full"] == 0
    assert scores["mix"] == pytest.approx(fmean(fmean(layers) for layers in errors))
    with open(tmp_path / CURVE, newline="") as file:
        curve = [line for line in csv.DictReader(file) if line["method"] == "mix"]
    assert [int(line["position"]) for line in curve] == list(range(1, 9))
    mean = fmean(line["compared"]["kl"][7] for line in lines if line["method"] == "mix")
    assert float(curve[-1]["kl"]) == pytest.approx(mean, rel=1e-5)
    go(tiny_folder, tmp_path, tasks=("needle",), samples=1, fresh=True)
    assert not (tmp_path / CURVE).exists()


CLOCKS = ("prefill_s", "compress_s", "ttft_ms", "decode_s", "tpot_ms", "decode_tokens_per_s", "peak_memory_bytes")


@pytest.mark.slow
def test_the_same_command_gives_the_same_samples(tiny_folder: Path, tmp_path: Path) -> None:
    """Whatever the method, a press that draws numbers included; only clocks may differ."""
    methods = ("full", "window", "mix", "hf:quanto-int4", "kvpress:snapkv", "kvpress:random")
    settings = {
        **toys(tmp_path / "toys"),
        "tasks": ("toy_east", "toy_text", "needle", "fidelity"),
        "quant_type": methods,
        "samples": 1,
        "continuation": 6,
        "text": a_text(tmp_path / "text.txt"),
        "budget_unit": "bytes",
        "quant_format": None,
    }
    twice = []
    for name in ("one", "two"):
        outcome, _ = go(tiny_folder, tmp_path / name, **settings)
        assert outcome.failures == []
        lines = read_lines(tmp_path / name / SAMPLES)
        assert {line["method"] for line in lines} == set(methods)
        assert all(line["prefill_s"] > 0 for line in lines)
        twice.append([{key: value for key, value in line.items() if key not in CLOCKS} for line in lines])
    assert twice[0] == twice[1]
    assert (tmp_path / "one" / CURVE).read_bytes() == (tmp_path / "two" / CURVE).read_bytes()


@pytest.mark.parametrize("batch_size", ["4", "auto"])
def test_the_batch_size_changes_no_score(
    tiny_folder: Path, tmp_path: Path, toy_run: tuple[Path, dict[str, Any], Outcome], batch_size: str
) -> None:
    _, settings, one = toy_run
    many, _ = go(tiny_folder, tmp_path, **settings, batch_size=batch_size)
    assert many.measured == one.measured
    assert [row.score for row in one.rows] == pytest.approx([row.score for row in many.rows])


def test_changed_rows_are_noticed(
    tiny_folder: Path, tmp_path: Path, toy_run: tuple[Path, dict[str, Any], Outcome]
) -> None:
    path, settings, _ = toy_run
    shutil.copytree(path, tmp_path / "run")
    shutil.copytree(settings["data_dir"], tmp_path / "data")
    settings = {**settings, "data_dir": tmp_path / "data"}
    file = settings["data_dir"] / "toy_text/test.jsonl"
    file.write_text(file.read_text().replace("magic", "tragic"))
    outcome, said = go(tiny_folder, tmp_path / "run", **settings)
    assert [failure["task"] for failure in outcome.failures] == ["toy_text"]
    assert "holds samples of toy_text over other data" in said
    assert outcome.measured == 0
    # A group whose task has failed has no score; its other tasks have theirs.
    assert {row.task for row in outcome.rows} == {"toy_east", "toy_west"}
    outcome, _ = go(tiny_folder, tmp_path / "run", fresh=True, **settings)
    assert not outcome.failures


def test_a_continued_run_keeps_when_and_how_it_began(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path, samples=1)
    first = recorded(tmp_path)
    assert first["continued"] == []
    for _ in range(2):
        go(tiny_folder, tmp_path, samples=1)
    record = recorded(tmp_path)
    assert (record["started"], record["command"]) == (first["started"], first["command"])
    assert [set(item) for item in record["continued"]] == [{"started", "command"}] * 2


@pytest.mark.slow
def test_the_default_model_finds_the_needle_with_the_full_cache(tmp_path: Path) -> None:
    settings = {"lengths": (2000,), "samples": 2, "dtype": "auto", "quant_type": ("full", "window")}
    outcome, _ = go(Path("smollm2-135m"), tmp_path, cache_size=(256,), window_size=(32,), **settings)
    full, window = outcome.rows
    assert full.score == 1.0
    assert window.score < 1.0
    assert (window.kv_share or 1.0) < 0.2


def test_generation_settings_of_a_models_file_and_of_the_command(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    file = folder / "generation_config.json"
    own = {**json.loads(file.read_text()), "repetition_penalty": 1.4, "do_sample": True, "temperature": 0.5}
    file.write_text(json.dumps(own))
    plain: dict[str, Any] = {"samples": 1, "quant_type": ("full",)}

    def tokens(path: Path) -> list[list[int]]:
        return [line["token_ids"] for line in read_lines(path / SAMPLES)]

    go(tiny_folder, tmp_path / "plain", **plain)
    assert "generation_config" not in capsys.readouterr().err
    go(folder, tmp_path / "penalty", **plain)
    said = (
        "tiny: of its generation_config.json, repetition_penalty=1.4 is applied and do_sample=True, temperature=0.5 are"
    )
    assert capsys.readouterr().err.count(said) == 1
    go(folder, tmp_path / "without", **plain, gen_kwargs="repetition_penalty=1.0,max_gen_toks=1")
    assert tokens(tmp_path / "penalty") != tokens(tmp_path / "plain") == tokens(tmp_path / "without")
    file.write_text(json.dumps({**own, "num_beams": 4}))
    outcome, _ = go(folder, tmp_path / "beams", **plain)
    assert all("generation setting num_beams=4: " in failure["error"] for failure in outcome.failures)
    assert outcome.failures
    outcome, _ = go(folder, tmp_path / "one", **plain, gen_kwargs='{"num_beams": 1}')
    assert tokens(tmp_path / "one") == tokens(tmp_path / "penalty")
    for given, said in (
        ("do_sample=true", "samples its answers"),
        ("nonsense=1", "nonsense=1: this setting is not known"),
    ):
        outcome, _ = go(folder, tmp_path / "refused", **plain, gen_kwargs=given, fresh=True)
        (failure,) = outcome.failures
        assert said in failure["error"]
        assert not outcome.measured


def test_states_are_left_once(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path / "run", samples=1)
    assert not (tmp_path / "run" / STATES).exists()
    go(tiny_folder, tmp_path / "run", samples=1, states=True)
    mix, window = read_maps(tmp_path / "run")
    assert (window.task, window.label) == ("needle", "window C=64 tokens per layer")
    assert sum(map(sum, mix.map.quantized)) > 0 == sum(map(sum, window.map.quantized))
    before = (tmp_path / "run" / STATES).read_bytes()
    go(tiny_folder, tmp_path / "run", samples=1, states=True)
    assert (tmp_path / "run" / STATES).read_bytes() == before
