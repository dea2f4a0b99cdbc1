"""A run that is continued: refused where answers could differ, kept apart where only times could."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import UserError
from bench.harness import index
from bench.models.inputs import input_hashes
from bench.names import RECORD, SAMPLES
from bench.records.starts import terms, timed
from bench.runs import starts
from bench.runs.executors.local import LocalExecutor
from bench.runs.starts import ANSWERING, earlier_starts
from tests.bench.conftest import read_lines
from tests.bench.lines import recorded
from tests.bench.runs.test_run import go, toys
from tests.conftest import ROOT


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """One of the test's own, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def refused(model: Path, run: Path, said: str, **settings: Any) -> None:
    """Nothing of the folder is touched."""
    before = {name: (run / name).read_bytes() for name in (RECORD, SAMPLES)}
    with pytest.raises(UserError, match=f"{said}.*give another --outdir, or --fresh to start it anew"):
        go(model, run, **settings)
    assert before == {name: (run / name).read_bytes() for name in before}


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


def test_another_end_of_the_answer_or_tokenizer(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(model, run, limit=1, quant_type=("full",))
    before = input_hashes(model)
    edit(model / "generation_config.json", transformers_version="4.0")
    assert input_hashes(model) == before
    go(model, run, limit=1, quant_type=("full",))
    edit(model / "generation_config.json", eos_token_id=[1, 2, 3])
    refused(model, run, r"the file tiny/generation_config\.json is \w{12}\.\.\. there and \w{12}\.\.\. here")
    shutil.copy(model / "generation_config.json", tmp_path)
    edit(model / "generation_config.json", eos_token_id=0)
    go(model, tmp_path / "other", limit=1, quant_type=("full",))
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    refused(model, tmp_path / "other", r"the file tiny/chat_template\.jinja is none there and")
    (model / "chat_template.jinja").unlink()
    edit(model / "tokenizer_config.json", model_max_length=77)
    refused(model, tmp_path / "other", r"the file tiny/tokenizer_config\.json is")


def test_another_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    go(model, run, limit=1, quant_type=("full",))
    with monkeypatch.context() as patch:
        patch.setattr(starts, "code_sha256", lambda: "f" * 64)
        refused(model, run, r"the source code that answers are made by is \w{12}\.\.\. there and f{12}\.\.\. here")
    # A commit that leaves it alone is another start.
    monkeypatch.setattr(starts.records, "_commit", lambda: {"commit": "b" * 40, "dirty": False})
    go(model, run, quant_type=("full",))
    assert [start["commit"] == "b" * 40 for start in recorded(run)["starts"]] == [False, True]
    assert [line["start"] for line in read_lines(run / SAMPLES)] == [0, 1, 1]


def test_the_code_that_answers_is_made_of_folders_that_are_there() -> None:
    assert all((ROOT / part).exists() for part in ANSWERING)


def test_another_definition_of_a_task(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {**toys(tmp_path / "toys"), "tasks": ("toy_east", "toy_text"), "quant_type": ("full",)}
    go(tiny_folder, tmp_path / "run", **settings)
    file = tmp_path / "toys/tasks/_choice"
    file.write_text(file.read_text().replace("acc_norm", "acc_bytes"))
    index.task_manager.cache_clear()
    outcome, _ = go(tiny_folder, tmp_path / "run", **settings)
    (failure,) = outcome.failures
    assert failure["task"] == "toy_east"
    assert "holds samples of toy_east by another definition of the task (SHA-256 " in failure["error"]
    assert outcome.measured == 0


def test_the_code_that_a_task_names_is_a_part_of_its_definition(tmp_path: Path) -> None:
    """With what it imports from beside it."""
    from bench.harness.definition import _code_sha256

    code, helper, other = (tmp_path / f"{name}.py" for name in ("utils", "helper", "other"))
    code.write_text("from helper import clean\n\n\ndef score(doc, results):\n    return {}\n")
    found = [_code_sha256(code)]
    for file, text in (
        (helper, "from . import deeper"),
        (tmp_path / "deeper.py", "import utils"),
        (code, "import helper"),
    ):
        file.write_text(text)
        found.append(_code_sha256(code))
    assert len(set(found)) == 4
    other.write_text("x = 1")
    assert _code_sha256(code) == found[-1]


def test_what_a_model_given_as_an_object_generates_with(tiny_folder: Path) -> None:
    from bench.models.given import given
    from bench.models.loading import load

    loaded = load(str(tiny_folder), dtype="float32", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    found = [given(model, tokenizer).fingerprint]
    tokenizer(["a", "bc def"], padding=True)
    assert given(model, tokenizer).fingerprint == found[0]
    model.generation_config.repetition_penalty = 1.3
    found.append(given(model, tokenizer).fingerprint)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    found.append(given(model, tokenizer).fingerprint)
    tokenizer.add_tokens(["<new>"])
    found.append(given(model, tokenizer).fingerprint)
    assert len(set(found)) == 4


@pytest.mark.parametrize(("dtype", "device"), [("bfloat16", "cpu"), ("float32", "cuda:1")])
def test_another_precision_or_device(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, device: str
) -> None:
    """As ``auto`` can find them on another machine."""
    go(tiny_folder, tmp_path, limit=1, quant_type=("full",))
    monkeypatch.setattr(LocalExecutor, "loaded", lambda _: {"tiny": {"dtype": dtype, "device": device}})
    refused(tiny_folder, tmp_path, rf"float32 on cpu, now {dtype} on {device.partition(':')[0]}")


def test_an_older_record_has_one_start() -> None:
    old = {"started": "then", "command": "run", "hardware": {"cpu": "x"}, "tasks": {}}
    (start,) = earlier_starts(old)
    assert (start["started"], start["hardware"]) == ("then", {"cpu": "x"})
    assert earlier_starts({"starts": [{"started": "now"}]}) == [{"started": "now"}]


def test_times_are_of_the_terms_that_most_samples_have() -> None:
    assert timed([], []) == frozenset()
    assert timed([0, 0, 1], ["a", "b"]) == {0}
    assert timed([0, 0, 1, 1], ["a", "b"]) == {1}, "the newest of equals"
    assert timed([0, 1, 1, 2], ["a", "b", "a"]) == {0, 2}
    one = {"hardware": {"torch_threads": 1}, "batch_size": "1", "executor": "local", "started": "then"}
    assert terms(one) == terms({**one, "started": "now", "commit": "abc"})
    assert terms(one) != terms({**one, "batch_size": "2"})
    assert terms(one) != terms({**one, "hardware": {"torch_threads": 2}})


def test_other_threads_and_batches_are_another_start(tiny_folder: Path, tmp_path: Path) -> None:
    go(tiny_folder, tmp_path, limit=1, quant_type=("full",))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        go(tiny_folder, tmp_path, quant_type=("full",), batch_size="2")
    finally:
        torch.set_num_threads(threads)
    first, second = recorded(tmp_path)["starts"]
    assert second["hardware"]["torch_threads"] == first["hardware"]["torch_threads"] + 1
    assert (first["batch_size"], second["batch_size"]) == ("1", "2")
    assert first["finished"] >= first["started"]
    assert len(first["source_sha256"]) == 64
    assert terms(first) != terms(second)
    assert [line["start"] for line in read_lines(tmp_path / SAMPLES)] == [0, 1, 1]
