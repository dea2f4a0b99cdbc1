"""Loading a folder: settings, damage, code that it brings, its fingerprint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.models import storage
from bench.models.loading import fingerprint, load
from tests.bench.models.conftest import fail, refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "bf16"}, "did you mean bfloat16"),
        ({"dtype": "int8"}, "known: auto, bfloat16"),
        ({"device": "tpu"}, "it is auto, cpu, cuda, cuda:N or mps"),
        ({"device": "meta"}, "it is auto, cpu, cuda, cuda:N or mps"),
        ({"device": "cuda:99"}, "not available here"),
        ({"model_kwargs": {"weights_only": False}}, "model_kwargs cannot set weights_only"),
        ({"model_kwargs": {"use_safetensors": False, "dtype": None}}, "cannot set dtype, use_safetensors"),
    ],
)
def test_wrong_settings_are_usage_errors(folder: Path, settings: dict[str, Any], said: str) -> None:
    error = refused(folder, **settings)
    assert said in str(error)
    assert error.exit_code == 2


def test_settings_reach_the_model(folder: Path) -> None:
    loaded = load(
        str(folder), dtype="float32", device="cpu", attn_implementation="eager", model_kwargs={"num_labels": 7}
    )
    assert loaded.dtype == "float32"
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.model.config.num_labels == 7
    assert "attn_implementation" in str(refused(folder, attn_implementation="nonsense"))
    assert "nonsense" in str(refused(folder, model_kwargs={"nonsense": 1}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_a_weight(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model.safetensors", truncate, "local cannot be loaded"),
        ("model.safetensors", drop_a_weight, "local lacks 1 of its weights, such as model.norm.weight"),
        ("config.json", truncate, "not a valid JSON file"),
        ("config.json", lambda file: file.write_text('{"model_type": "wonder"}'), "`wonder`"),
        ("tokenizer.json", lambda file: file.write_text("{}"), "local cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, file: str, damage: Callable[[Path], object], said: str) -> None:
    damage(folder / file)
    assert said in str(refused(folder))


def test_code_of_a_model_runs_only_when_trusted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "runs only with trust_remote_code" in str(refused(folder))
    assert not ran.exists()
    assert type(load(str(folder), trust_remote_code=True).model).__name__ == "OwnModel"
    assert ran.exists()


def test_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(str(folder)).fingerprint
    assert found == fingerprint(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"transformers_version": "5.99"}))
    assert fingerprint(folder) == found
    with monkeypatch.context() as patched:  # the hash of the weights is remembered
        patched.setattr(storage, "file_sha256", fail)
        assert fingerprint(folder) == found
    config.write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    assert fingerprint(folder) != found
    config.write_text(json.dumps(settings))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(folder) != found
