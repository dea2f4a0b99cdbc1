"""Tiny GGUF files and folders made of them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.errors import UserError
from bench.models.loading import fetch, load
from bench.models.references import resolve
from tests.bench.models.serving import Served, serve

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
    split: int | None = None,
    big_endian: bool = False,
    packed: bool = False,
) -> Path:
    """A tiny model with random weights, matrices ``packed`` in eight bits or not, and a byte-level vocabulary."""
    import gguf
    import numpy as np

    tokens = vocabulary()
    endian = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    if split is not None:
        writer.add_uint16("split.count", split)
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
    if architecture == "qwen3":
        writer.add_key_length(HIDDEN // HEADS)
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
        if architecture == "qwen3":
            shapes |= {f"blk.{layer}.attn_{part}_norm.weight": (HIDDEN // HEADS,) for part in "qk"}
        if architecture == "qwen2":
            shapes |= {f"blk.{layer}.attn_{part}.bias": (block[f"attn_{part}"][0],) for part in "qkv"}
    if extra_tensor is not None:
        shapes[extra_tensor] = (HIDDEN // HEADS // 2,)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        weights = generator.normal(0, 0.2, shape).astype(np.float32)
        if name == left_out:
            continue
        if packed and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)
        else:
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
    return Path(shutil.copytree(fetch(resolve(str(gguf_file))), tmp_path / "local"))


def refused(reference: str | Path, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(str(reference), **settings)
    assert "\n" not in str(caught.value)
    return caught.value


def fail(*_: object, **__: object) -> None:
    raise AssertionError("must not be called")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that this machine's owner has set about package indexes counts, and no proxy."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture(params=["json", "html"])
def served(request: pytest.FixtureRequest, no_index: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """An index in either form, the only one that is set up."""
    with serve(request.param) as found:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", found.url)
        yield found
