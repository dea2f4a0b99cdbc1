"""What a model's folder holds beside weights and config that changes its answers, file by file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bench.models.loading import DescribedModel
from bench.models.storage import file_sha256

GENERATION_CONFIG = "generation_config.json"
"""Among others, the tokens that end an answer."""
FILES = (
    *(GENERATION_CONFIG, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.py"),
)
"""Patterns of their names: end tokens, the tokenizer, the chat template, code that the model brings."""


def input_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each such file by its name. The version of transformers that wrote a file does not count."""
    files = sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})
    return {path.name: _hash(path) for path in files}


def identity(model: DescribedModel) -> str:
    """Of weights, config and these files: machines that answer for one run must find the same."""
    named = json.dumps([model.fingerprint, input_hashes(model.folder)], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def _hash(path: Path) -> str:
    if path.name != GENERATION_CONFIG:
        return file_sha256(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return file_sha256(path)
    if isinstance(content, dict):
        content.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
