"""What must be in no file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from bench.cli import main
from bench.runs.folder import command_line
from bench.settings.run import RunConfig
from bench.settings.secrets import redacted, redacted_arguments

SECRET = "hf_AbCdEf123"


@pytest.mark.parametrize("name", ["token", "hf_token", "api_key", "API-KEY", "password", "client_secret", "secret"])
def test_names_of_secrets(name: str) -> None:
    assert redacted({name: SECRET, "revision": "main", "more": [{name: SECRET}]}) == {
        name: "***",
        "revision": "main",
        "more": [{name: "***"}],
    }


@pytest.mark.parametrize("name", ["tokenizer", "monkey", "revision", "key_states", "use_cache", "pad_token_id"])
def test_names_of_others(name: str) -> None:
    assert redacted({name: 5}) == {name: 5}


@pytest.mark.parametrize(
    "words",
    [
        ["--model-kwargs", f"token={SECRET},revision=main"],
        [f"--model-kwargs=token={SECRET},revision=main"],
        ["--model_kwargs", f"{{token: {SECRET}, revision: main}}"],
        [f'--model_kwargs={{"token": "{SECRET}", "revision": "main"}}'],
    ],
)
def test_the_command_that_is_recorded(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["arkv-bench", "run", *words, "--seed", "1"])
    assert SECRET not in command_line()
    assert '"revision": "main"' in " ".join(shlex.split(command_line()))
    assert command_line().endswith("--seed 1")


def test_what_cannot_be_read_is_hidden_whole() -> None:
    assert redacted_arguments(["run", "--model-kwargs", f"{{token {SECRET}"]) == ["run", "--model-kwargs", "***"]
    assert redacted_arguments(["--model-kwargs", "a=1", "x"]) == ["--model-kwargs", "a=1", "x"]


def test_settings_hand_it_to_the_library_only() -> None:
    config = RunConfig(model_kwargs=f"token={SECRET},revision=main")
    assert config.loading_kwargs == {"token": SECRET, "revision": "main"}
    assert SECRET not in str(config.to_json())
    assert SECRET not in str(config.fingerprint())
    assert config.fingerprint()["model_kwargs"] == {"token": "***", "revision": "main"}


def test_no_file_of_a_run_has_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--model", str(tiny_folder), "--model-kwargs", f"token={SECRET}", "--outdir", str(tmp_path / "run")]
    words += ["--methods", "mix", "--cache-size", "64", "--lengths", "250", "--samples", "1", "--states"]
    monkeypatch.setattr(sys, "argv", ["arkv-bench", *words])
    for more in ([], ["--print-config"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        assert not ended.value.code
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run"), "--html", str(tmp_path / "run" / "page.html")])
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
