"""The tokenizer of a GGUF file, as its metadata describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.errors import UserError

_LETTERS_AND_SIGNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLIT_REGEX = {"qwen2": _LETTERS_AND_SIGNS % "", "llama-bpe": _LETTERS_AND_SIGNS % "{1,3}"}
PRE_TOKENIZERS = ("smollm", "gpt-2", *_SPLIT_REGEX)
"""The values of ``tokenizer.ggml.pre`` that are converted faithfully."""


def gguf_tokenizer(name: str, metadata: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The tokenizer that GGUF metadata describes, and the entries it adds to ``tokenizer_config.json``.

    transformers' own conversion guesses from the architecture instead of reading ``tokenizer.ggml.pre``: digits and
    spaces come out differently from what the model was trained on. Raises :class:`UserError` on a kind that is not
    known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # type: ignore[import-untyped]

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        unknown = f"tokenizer {kind!r}" if kind != "gpt2" else f"pre-tokenizer {pre!r}"
        raise UserError(
            f"{name} has the {unknown}, which is not converted (known: gpt2 with {', '.join(PRE_TOKENIZERS)}): "
            "pass a local folder or a hub id with a tokenizer"
        )
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in metadata["tokenizer.ggml.merges"])]
    if any(part not in vocabulary for left, right in merges for part in (left, right, left + right)):
        raise UserError(f"{name} is damaged: its tokenizer merges into tokens that it does not have")

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT_REGEX[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # Qwen's own tokenizer composes accents; GGUF has no key for it
    tokenizer.decoder = decoders.ByteLevel()

    control, user_defined = 3, 4
    types: Sequence[int] = metadata["tokenizer.ggml.token_type"]
    added = [
        AddedToken(token, special=type_ == control, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (control, user_defined)
    ]
    tokenizer.add_tokens(added)

    config: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{role}_token"] = tokens[index]
    if "eos_token" in config:
        config.setdefault("pad_token", config["eos_token"])
    ends = {
        "bos": bool(metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")) and "bos_token" in config,
        "eos": bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in config,
    }
    config |= {f"add_{role}_token": adds for role, adds in ends.items()}
    before = [config["bos_token"]] if ends["bos"] else []
    after = [config["eos_token"]] if ends["eos"] else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, vocabulary[token]) for token in (*before, *after)],
    )
    return tokenizer, config


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens at which an answer ends.

    Qwen's own generation config names ``<|endoftext|>`` beside ``<|im_end|>``, for which GGUF has no key; llama.cpp
    goes by its name, too.
    """
    ids = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    if metadata["tokenizer.ggml.pre"] == "qwen2" and "<|endoftext|>" in tokens:
        ids.append(tokens.index("<|endoftext|>"))
    return [index for index in dict.fromkeys(ids) if index is not None]
