"""The transformers configuration of the model in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""The values of ``general.architecture`` that are converted faithfully."""

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_HEAD_DIM = {"llama": "rope.dimension_count", "qwen3": "attention.key_length"}
"""Where an architecture states its head dimension; where it does not, transformers' default holds."""
_OPTIONAL = {
    "general.name": "_model_name_or_path",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
}


def gguf_config(name: str, metadata: Mapping[str, Any], *, tied: bool) -> Any:
    """The transformers config that GGUF metadata describes.

    transformers reads it too, but in a minute for a vocabulary of 150,000 tokens, all of which it unpacks on the way.

    Args:
        name: of the file, for errors.
        tied: the file holds no matrix for its output, which is then that of the embeddings.

    Raises:
        UserError: the architecture is not known here, or a fact is missing.
    """
    from transformers import AutoConfig

    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{name} has the architecture {architecture}, which is not converted (known: {known}): pass a local folder "
            "or a hub id"
        )
    for key in _KEYS:
        if f"{architecture}.{key}" not in metadata:
            raise UserError(f"{name} does not state its {architecture}.{key}")
    settings = {ours: metadata[f"{architecture}.{key}"] for key, ours in _KEYS.items()}
    settings |= {ours: metadata[key] for key, ours in _OPTIONAL.items() if key in metadata}
    if (head_dim := metadata.get(f"{architecture}.{_HEAD_DIM.get(architecture)}")) is not None:
        settings["head_dim"] = head_dim
    return AutoConfig.for_model(
        architecture,
        num_key_value_heads=metadata.get(f"{architecture}.attention.head_count_kv", settings["num_attention_heads"]),
        rope_theta=metadata.get(f"{architecture}.rope.freq_base", 10_000.0),
        vocab_size=metadata.get(f"{architecture}.vocab_size", len(metadata["tokenizer.ggml.tokens"])),
        tie_word_embeddings=tied,
        **settings,
    )
