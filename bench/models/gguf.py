"""A GGUF file as a transformers model, converted once into the cache folder."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.models.library import check_complete, load_transformers, one_line, transformers_errors
from bench.models.storage import cache_root
from bench.models.tokenizer import gguf_tokenizer

logger = logging.getLogger(__name__)


CONVERTER_VERSION = 1
"""Part of the name of a converted model's folder. Raise it when the conversion changes what it writes."""


def converted_folder(gguf_sha256: str) -> Path:
    """Where the model converted from a GGUF file of this checksum lies, or would."""
    return cache_root() / "models" / f"gguf-{gguf_sha256[:16]}-v{CONVERTER_VERSION}"


def convert_once(gguf_sha256: str, provide: Callable[[Path], Path]) -> Path:
    """The converted folder of a GGUF file, made now if need be from the file that ``provide(scratch_folder)`` returns.

    The folder appears by one rename when everything in it is written, under a lock: a killed conversion leaves only a
    scratch folder, which the next one clears.
    """
    import filelock

    folder = converted_folder(gguf_sha256)
    if folder.is_dir():
        return folder
    work = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                try:
                    convert_gguf(provide(work), work / "model")
                    os.replace(work / "model", folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(f"The cache folder {cache_root()} cannot be written ({error}): set ARKV_CACHE") from error
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` to the new ``folder`` as a transformers model with its tokenizer.

    All weights are unpacked in memory at once, in float32. Raises :class:`UserError` on a file that is damaged or of a
    kind that would not be converted faithfully.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"Converting a GGUF file needs the package {package}: pip install {package}")
    import torch

    library = load_transformers()
    logger.info("converting %s to safetensors", gguf.name)
    metadata = _read_gguf(gguf)
    tokenizer, tokenizer_config = gguf_tokenizer(gguf.name, metadata)
    # Newer releases keep the weights packed unless told otherwise, and then cannot save them.
    config_class = getattr(library, "GgufConfig", None)
    unpack = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    with transformers_errors(f"{gguf.name} cannot be converted"):
        # bfloat16 halves the file, and is what models run in by default: running SmolLM2 in it moves the next-token
        # distribution twenty times further from float32 (KL 1.1e-3) than rounding the unpacked weights does (5e-5).
        model, info = library.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, output_loading_info=True, **unpack
        )
    check_complete(info, gguf.name)

    special = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding")}
    ends = [token for token in dict.fromkeys((special["eos"], special["eot"])) if token is not None]
    pad = special["padding"] if special["padding"] is not None else special["eos"]
    model.generation_config = library.GenerationConfig(
        bos_token_id=special["bos"], eos_token_id=ends[0] if len(ends) == 1 else ends or None, pad_token_id=pad
    )
    with transformers_errors(f"{gguf.name} cannot be saved in the cache folder"):
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # written for the owner alone, unlike the other files
    # Written by hand: transformers' own writers differ between versions in the class they name, and a tokenizer class
    # other than this one rebuilds the pre-tokenizer its own way.
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
                **tokenizer_config,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _read_gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by key. Raises :class:`UserError` if it is unreadable or scales rotary positions."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is no readable GGUF file: {one_line(error)}") from error
    architecture = metadata.get("general.architecture")
    if f"{architecture}.context_length" not in metadata:
        raise UserError(f"{path.name} does not state its architecture and context length")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise UserError(
            f"{path.name} scales its rotary positions, which transformers drops from a GGUF file: "
            "pass a local folder or a hub id instead"
        )
    return metadata
