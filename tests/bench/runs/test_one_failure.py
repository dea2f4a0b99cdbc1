"""One failure, one row: what a method, a model or a task raises is recorded where it happened, and all else goes on."""

from __future__ import annotations

import functools
import io
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from bench.cli import main
from bench.errors import NOBODY_READS, UserError
from bench.methods.tristate import TriState
from bench.models.loading import describe
from bench.names import RESULTS, SAMPLES
from bench.records.record import read_record
from bench.runs.asked import asked_for, documents_of, plugins_of
from bench.runs.failures import failure_lines
from bench.runs.folder import RunFolder
from bench.runs.run import Outcome, execute
from bench.settings.run import RunConfig
from tasks.needle import NeedleTask
from tests.bench.conftest import quiet_environment, read_lines, save_tiny_model
from tests.bench.lines import recorded
from tests.conftest import ROOT


class OddError(Exception):
    """Of no known kind, and with a text that no terminal should obey."""

    def __str__(self) -> str:
        return "\x1b[31m odd \udcff\n and long: " + "x" * 5000


KINDS: tuple[type[BaseException], ...] = (
    *(AttributeError, IndexError, KeyError, ValueError, TypeError, ZeroDivisionError, AssertionError, RuntimeError),
    *(MemoryError, OSError, NotImplementedError, StopIteration, RecursionError, ImportError, SystemExit, OddError),
)
CELLS, DOCUMENTS = 3, 4


def settings(*folders: Path, **more: Any) -> RunConfig:
    given: dict[str, Any] = {
        "model": tuple(map(str, folders)),
        "tasks": ("needle",),
        "lengths": (200,),
        "samples": DOCUMENTS,
        "quant_type": ("full", "mix", "window"),
        "cache_size": (64,),
        "window_size": (8,),
        "device": "cpu",
        "dtype": "float32",
        "question": "before",
    }
    return RunConfig(**{**given, **more})


def go(config: RunConfig, path: Path) -> Outcome:
    return execute(config, path, Console(file=io.StringIO(), width=200))


def moody(function: Callable[..., Any], share: float, drawn: random.Random) -> Callable[..., Any]:
    """``function``, which raises now and then instead."""

    @functools.wraps(function)
    def called(*arguments: Any, **named: Any) -> Any:
        if drawn.random() < share:
            raise drawn.choice(KINDS)("not today")
        return function(*arguments, **named)

    return called


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_errors_at_random_points(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, batch_size: int
) -> None:
    drawn = random.Random(seed)
    config = settings(tiny_folder, batch_size=batch_size)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        for where, name, share in (
            (TriState, "make", 0.2),
            (LlamaForCausalLM, "forward", 0.02),
            (NeedleTask, "score", 0.1),
            (PreTrainedTokenizerFast, "decode", 0.001),
        ):
            patch.setattr(where, name, moody(getattr(where, name), share, drawn))
        outcome = go(config, folder)
    assert (folder / RESULTS).is_file()
    assert recorded(folder)["finished"]
    assert recorded(folder)["failures"] == outcome.failures
    done = [(line["document"], line["cell"]) for line in read_lines(folder / SAMPLES)]
    failed = [(failure["document"], failure["cell"]) for failure in outcome.failures if "document" in failure]
    # A task that could not make its documents has one failure of its own.
    if len(outcome.failures) == len(failed):
        assert len({*done, *failed}) == len(done) + len(failed) == CELLS * DOCUMENTS
    for failure in outcome.failures:
        assert re.search(r"\w+(: .+)? \(\w+\.py, line \d+\)$", failure["error"]), failure["error"]
        assert failure["error"].isprintable()
        assert len(failure["error"]) < 700
    again = go(config, folder)
    assert again.failures == []
    assert len(read_lines(folder / SAMPLES)) == CELLS * DOCUMENTS


def test_one_document_does_not_lose_those_beside_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that share a forward, and answers that are decoded in one."""
    config = settings(tiny_folder, batch_size=DOCUMENTS, lengths=(100,))
    cells, (task,), _ = asked_for(config, *plugins_of(config))
    assert isinstance(task, NeedleTask)
    documents = documents_of(config, describe(str(tiny_folder)), task, cells)
    bad = documents[1]
    marked = list(bad.request.prompt_ids)  # type: ignore[union-attr]
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def checked(self: Any, input_ids: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if any(row[-len(marked) :] == marked or row[: len(marked)] == marked for row in input_ids.tolist()):
            raise IndexError("index out of range in self")
        return forward(self, input_ids, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", checked)
    outcome = go(config, tmp_path / "run")
    assert {failure["document"] for failure in outcome.failures} == {bad.id}
    assert len(outcome.failures) == CELLS
    assert "IndexError: index out of range in self (test_one_failure.py, line" in outcome.failures[0]["error"]
    assert len(read_lines(tmp_path / "run" / SAMPLES)) == CELLS * (DOCUMENTS - 1)


def test_a_score_that_raises_is_the_failure_of_one_answer(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = NeedleTask.score
    calls = iter(range(1000))

    def fails_once(self: Any, document: Any, answer: Any) -> dict[str, float]:
        if next(calls) == 1:
            raise LookupError("no such thing")
        return score(self, document, answer)

    monkeypatch.setattr(NeedleTask, "score", fails_once)
    outcome = go(settings(tiny_folder), tmp_path / "run")
    (failure,) = outcome.failures
    assert failure["error"].startswith("needle: LookupError: no such thing (test_one_failure.py, line ")
    assert {"cell", "document"} <= set(failure)
    assert len(read_lines(tmp_path / "run" / SAMPLES)) == CELLS * DOCUMENTS - 1
    assert len({row.cell for row in outcome.rows}) == CELLS


def test_an_evaluation_that_raises_is_the_failure_of_one_cell(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = NeedleTask.evaluate
    calls = iter(range(1000))

    def fails_once(self: Any, documents: Any, answers: Any) -> Any:
        if next(calls) == 1:
            raise OverflowError("too large")
        return evaluate(self, documents, answers)

    monkeypatch.setattr(NeedleTask, "evaluate", fails_once)
    outcome = go(settings(tiny_folder), tmp_path / "run")
    (failure,) = outcome.failures
    assert "needle: OverflowError: too large" in failure["error"]
    assert len({row.cell for row in outcome.rows}) == CELLS - 1
    assert failure["cell"] not in {row.cell for row in outcome.rows}
    assert read_record(tmp_path / "run").failures
    (line,) = failure_lines(outcome.failures)
    assert "all documents together: OverflowError" in line


def test_models_that_cannot_be_used_beside_one_that_can(tiny_folder: Path, tmp_path: Path) -> None:
    mamba, broken = tmp_path / "mamba", tmp_path / "broken"
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=None)
    MambaForCausalLM(config).save_pretrained(mamba)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, mamba)
    save_tiny_model(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    outcome = go(settings(mamba, broken, tiny_folder, samples=1, max_length=400), tmp_path / "run")
    assert {line["model"] for line in read_lines(tmp_path / "run" / SAMPLES)} == {"tiny"}
    assert {row.model for row in outcome.rows} == {"tiny"}
    failed = [(failure["model"], failure["cell"].partition("-")[0]) for failure in outcome.failures]
    assert sorted(failed) == sorted((name, cell) for name in ("mamba", "broken") for cell in ("full", "mix", "window"))


def test_a_model_that_was_mended_goes_on_in_the_same_folder(tiny_folder: Path, tmp_path: Path) -> None:
    """What it is now is no other setting: it has answered nothing. What has answered must stay as it was."""
    broken, folder = tmp_path / "broken", tmp_path / "run"
    save_tiny_model(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert go(settings(tiny_folder, broken, samples=1), folder).failures
    save_tiny_model(broken, seed=1)
    (broken / "generation_config.json").write_text('{"eos_token_id": 5}')
    outcome = go(settings(tiny_folder, broken, samples=1), folder)
    assert (outcome.failures, outcome.measured) == ([], CELLS)
    assert {row.model for row in outcome.rows} == {"tiny", "broken"}
    (broken / "generation_config.json").write_text('{"eos_token_id": 6}')
    with pytest.raises(UserError, match=r"other settings: the file broken/generation_config.json is"):
        go(settings(tiny_folder, broken, samples=1), folder)


def small(folder: Path, tokenizer: Path, config: Any) -> Path:
    """A random model of ``config`` with the tiny model's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MIXED = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}


@pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed")
@pytest.mark.parametrize(
    ("family", "more", "press"),
    [("qwen2", {}, "kvpress:criticalkv"), ("gemma3_text", MIXED, "kvpress:expected_attention")],
)
def test_a_press_that_cannot_do_the_model(
    tiny_folder: Path, tmp_path: Path, family: str, more: dict[str, Any], press: str
) -> None:
    model = small(tmp_path / family, tiny_folder, AutoConfig.for_model(family, **SHAPE, **more))
    outcome = go(settings(model, samples=2, quant_type=("full", press, "mix")), tmp_path / "run")
    assert len(outcome.failures) == 2
    for failure in outcome.failures:
        assert failure["cell"].startswith(press)
        assert failure["error"].startswith(press)
        assert failure["error"].isprintable()
    assert {row.method for row in outcome.rows} == {"full", "mix"}
    assert (tmp_path / "run" / RESULTS).is_file()


def test_a_tokenizer_larger_than_the_embedding(tiny_folder: Path, tmp_path: Path) -> None:
    short = small(tmp_path / "short", tiny_folder, AutoConfig.for_model("llama", **{**SHAPE, "vocab_size": 100}))
    outcome = go(settings(short, tiny_folder, samples=1), tmp_path / "run")
    (failure,) = outcome.failures
    assert (failure["model"], failure["task"]) == ("short", "needle")
    assert re.search(r"has the token \d+ in its prompt; the model knows 0 to 99$", failure["error"])
    assert {row.model for row in outcome.rows} == {"tiny"}


# --- Where the output goes ---


def options(folder: Path, *more: str) -> list[str]:
    return [
        *["run", "--model", str(folder), "--device", "cpu", "--dtype", "float32", "--lengths", "200"],
        *["--samples", "3", "--methods", "full,mix", "--cache-size", "64", "--window-size", "8", *more],
    ]


def ends(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("arkv-bench:")]
    return int(ended.value.code or 0), line


def test_a_folder_that_vanishes(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    score = NeedleTask.score

    def vanishes(self: Any, document: Any, answer: Any) -> dict[str, float]:
        shutil.rmtree(folder)
        return score(self, document, answer)

    monkeypatch.setattr(NeedleTask, "score", vanishes)
    code, line = ends(capsys, options(tiny_folder, "--outdir", str(folder)))
    assert code == 1
    said = f"{folder / SAMPLES}: No such file or directory"
    assert line == f"arkv-bench: stopped: {said}; the same command with --outdir {folder} continues"


def test_a_folder_that_becomes_read_only(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: RunFolder, sample: Any) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(RunFolder, "append", refuses)
    folder = tmp_path / "run"
    code, line = ends(capsys, options(tiny_folder, "--outdir", str(folder)))
    assert code == 1
    assert line.startswith(f"arkv-bench: stopped: {folder}: Read-only file system; the same command")


@pytest.mark.slow
def test_output_that_nobody_reads(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "bench.cli"]
    run = [*command, *options(tiny_folder, "--outdir", str(folder))]
    report = [*command, "report", str(folder)]

    def unread(arguments: list[str]) -> tuple[int, str]:
        with subprocess.Popen(
            arguments, cwd=ROOT, env=quiet_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            return process.wait(120), process.stderr.read()

    code, said = unread(run)
    again = f"the same command with --outdir {folder} continues"
    stopped = f"stopped, since nobody reads what it prints; what was measured is in {folder}: {again}"
    assert (code, said) == (NOBODY_READS, f"arkv-bench: {stopped}\n")
    subprocess.run(run, cwd=ROOT, env=quiet_environment(), check=True, capture_output=True)
    assert unread(report) == (NOBODY_READS, "arkv-bench: nobody reads what it prints; stopped\n")


def unmeasurable(task: NeedleTask, document: Any, answer: Any) -> dict[str, float]:
    """Two answers have no score: what came out is no number."""
    return {"exact_match": float("nan") if document.id.endswith(("-1", "-3")) else 1.0}


def test_scores_that_are_no_numbers_are_counted_and_named_and_never_averaged(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NeedleTask, "score", unmeasurable)
    outcome = go(settings(tiny_folder, quant_type=("full", "window")), tmp_path / "run")
    assert outcome.rows == []
    said = [failure["error"] for failure in outcome.failures]
    assert len(said) == 2
    for line in said:
        assert "over 4 documents is nan, no number: 2 of them have none of their own: 200-d0.38-1, 200-d0.88-3" in line
