"""The conversion of GGUF files, their tokenizers included."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench.models import gguf as conversion
from bench.models import weights
from bench.models.loading import fetch, load
from bench.models.references import resolve
from bench.models.tokenizer import end_tokens, gguf_tokenizer
from tests.bench.models.conftest import BOS, CONTEXT, EOS, HIDDEN, MERGES, PAD, THINK, fail, refused, write_gguf


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
    loaded = load(str(file))
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
    folder = fetch(resolve(str(file)))
    for tokenizer in (load(str(file)).tokenizer, AutoTokenizer.from_pretrained(folder)):
        plain = tokenizer("the", add_special_tokens=False)["input_ids"]
        assert tokenizer("the")["input_ids"] == [1] * added + plain
        assert tokenizer("the", "the")["input_ids"] == 2 * ([1] * added + plain)


def test_qwen2_composes_accents(cache: Path, tmp_path: Path) -> None:
    tokenizer = load(str(write_gguf(tmp_path / "t.gguf", architecture="qwen2", pre="qwen2"))).tokenizer
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
        (
            {"architecture": "wonder"},
            "has the architecture wonder, which is not converted (known: llama,",
        ),
        ({"architecture": "gemma3", "tokenizer": "llama"}, "has the architecture gemma3"),
        ({"split": 3}, "is one of 3 files of a model: put them together with llama.cpp's `llama-gguf-split --merge`"),
        ({"big_endian": True}, "is in the byte order of other machines (big-endian)"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "holds blk.0.attn_q.bias, for which transformers' llama has no place"),
    ],
)
def test_ggufs_that_would_convert_unfaithfully_are_refused(
    cache: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    error = refused(write_gguf(tmp_path / "tiny.gguf", **settings))
    assert said in str(error)
    assert "tiny.gguf" in str(error)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_and_config_are_those_that_transformers_reads(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, packed: bool
) -> None:
    """Which unpacks all in float32 first; here in blocks of a few rows."""
    import torch
    import transformers

    pre = "qwen2" if architecture == "qwen2" else "smollm"
    file = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, pre=pre, packed=packed)
    monkeypatch.setattr(weights, "_BLOCK", 3 * HIDDEN)
    ours = load(str(file)).model
    config_class = getattr(transformers, "GgufConfig", None)
    unpack = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.bfloat16, **unpack
    )
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    left_out = {"_name_or_path", "_model_name_or_path", "architectures", "quantization_config"}
    ours_said, theirs_said = (
        {key: value for key, value in model.config.to_dict().items() if key not in left_out} for model in (ours, theirs)
    )
    assert ours_said == theirs_said


def test_qwen3_converts(cache: Path, tmp_path: Path) -> None:
    import torch

    loaded = load(str(write_gguf(tmp_path / "tiny.gguf", architecture="qwen3", pre="qwen2")))
    assert loaded.model.config.head_dim == HIDDEN // 2
    assert loaded.model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


TEXTS = [
    "In 2024, 1234567 people\n\n\n  and ３ more\r\n\r\n",
    "今天天气很好，我们去公园。\n한국어 문장 12개",
    "class A:\n\n    def f(self, x):\n\t\treturn x**2 // 10  # ok\n\n\n        pass\n  ",
    "I'LL we'Ve it's  'd e\u0301 ＡＢ １２ the  the",
    f"{BOS}user\nthe{EOS}\n{THINK}12",
]


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_tokens_are_those_of_the_official_rules(tmp_path: Path, text: str) -> None:
    """transformers' own class, written by the publisher of the models, over the same vocabulary."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    _, metadata = conversion._read_gguf(write_gguf(tmp_path / "t.gguf", architecture="qwen2", pre="qwen2"))
    built, _ = gguf_tokenizer("t.gguf", metadata)
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    official = Qwen2Tokenizer(vocab=vocabulary, merges=MERGES, eos_token=EOS, pad_token=PAD, unk_token=EOS)
    official.add_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS, PAD, THINK)])
    assert built.encode(text).ids == official(text)["input_ids"]


def test_qwen2_answers_end_at_the_end_of_a_text_too() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["a", "<|endoftext|>", "<|im_end|>"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.pre": "qwen2",
    }
    assert end_tokens(metadata) == [2, 1]
    assert end_tokens(metadata | {"tokenizer.ggml.pre": "smollm"}) == [2]
    assert end_tokens(metadata | {"tokenizer.ggml.eot_token_id": 0}) == [2, 0, 1]


@pytest.mark.parametrize("content", [b"", b"no GGUF at all" * 100, None])
def test_damaged_gguf(cache: Path, gguf_file: Path, content: bytes | None) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:5000] if content is None else content)
    assert "no readable GGUF file" in str(refused(gguf_file))


def test_conversion_happens_once_per_content(cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(resolve(str(gguf_file)))
    monkeypatch.setattr(conversion, "convert_gguf", fail)
    copy = Path(shutil.copy(gguf_file, gguf_file.with_name("copy.gguf")))
    assert fetch(resolve(str(copy))) == first
    os.utime(gguf_file)
    assert fetch(resolve(str(gguf_file))) == first
    with gguf_file.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(AssertionError):
        fetch(resolve(str(gguf_file)))


def test_a_killed_conversion_leaves_nothing_that_counts(
    cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(str(gguf_file))

    def interrupted(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(source)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]

    # What SIGKILL leaves: no clean-up has run.
    name = conversion.converted_folder(hashlib.sha256(gguf_file.read_bytes()).hexdigest()).name
    half = cache / "models" / f"{name}.partial" / "model"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    (half / "junk").write_text("junk")
    folder = fetch(source)
    assert not (folder / "junk").exists()
    assert sorted(path.name for path in (cache / "models").iterdir()) == [name, f"{name}.lock"]
    assert load(str(gguf_file)).model.config.hidden_size == HIDDEN


def test_two_conversions_at_once(
    cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = resolve(str(gguf_file))
    runs = []

    def slow(_: Path, folder: Path) -> None:
        runs.append(folder)
        folder.mkdir()
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(conversion, "convert_gguf", slow)
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append((fetch(source) / "config.json").is_file())) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(runs), found) == (1, [True] * 3)
    assert f"Waiting for another process, which is making {cache}" in capsys.readouterr().err


def test_cache_that_cannot_be_written(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARKV_CACHE", str(gguf_file / "under-a-file"))
    assert "set ARKV_CACHE" in str(refused(gguf_file))
