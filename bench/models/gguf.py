"""A GGUF file as a transformers model, converted once into the cache folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.models.architecture import gguf_config
from bench.models.library import load_transformers, one_line, transformers_errors
from bench.models.storage import cache_root
from bench.models.tokenizer import end_tokens, gguf_tokenizer
from bench.models.weights import fill, unpacked_size
from bench.progress import MB, ProgressReporter, say, stderr

if TYPE_CHECKING:
    from filelock import FileLock
    from gguf import GGUFReader

OUTPUT = "output.weight"
ELSE = "pass a local folder or a hub id instead"

CONVERTER_VERSION = 1
"""Part of the name of a converted model's folder. Raise it when the conversion changes what it writes."""


def converted_folder(gguf_sha256: str) -> Path:
    """Where the model converted from a GGUF file of this checksum lies, or would."""
    return cache_root() / "models" / f"gguf-{gguf_sha256[:16]}-v{CONVERTER_VERSION}"


def convert_once(gguf_sha256: str, provide: Callable[[], AbstractContextManager[Path]]) -> Path:
    """The converted folder of a GGUF file, made now if need be from the file for whose use ``provide()`` is entered.

    The folder appears by one rename when everything in it is written, under a lock: a killed conversion leaves only a
    scratch folder, which the next one clears. Where another process is at it, this one waits for what it makes.
    """
    import filelock

    folder = converted_folder(gguf_sha256)
    if folder.is_dir():
        return folder
    work = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(filelock.FileLock(folder.with_name(f"{folder.name}.lock"))):
            if not folder.is_dir():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                try:
                    with provide() as file:
                        convert_gguf(file, work / "model")
                        os.replace(work / "model", folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(f"The cache folder {cache_root()} cannot be written ({error}): set ARKV_CACHE") from error
    return folder


@contextmanager
def _alone(lock: FileLock) -> Iterator[None]:
    """Hold a lock, and say so where that means waiting."""
    import filelock

    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Waiting for another process, which is making {lock.lock_file.removesuffix('.lock')}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` to the new ``folder`` as a transformers model with its tokenizer, with progress on stderr.

    Memory: about the file and the weights in bfloat16. Raises :class:`UserError` on a file that is damaged or of a kind
    that would not be converted faithfully.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("Converting a GGUF file needs the package gguf: pip install gguf")
    import torch

    library = load_transformers()
    say(f"Converting {gguf.name} to safetensors, once, in {folder.parent.parent}")
    say(f"Reading the vocabulary of {gguf.name}, which takes up to half a minute")
    reader, metadata = _read_gguf(gguf)
    with transformers_errors(f"{gguf.name} cannot be converted"):
        config = gguf_config(gguf.name, metadata, tied=all(tensor.name != OUTPUT for tensor in reader.tensors))
    tokenizer, tokenizer_config = gguf_tokenizer(gguf.name, metadata)
    size = unpacked_size(reader)
    with transformers_errors(f"{gguf.name} cannot be converted"):
        # bfloat16 halves the file, and is what models run in by default: running SmolLM2 in it moves the next-token
        # distribution twenty times further from float32 (KL 1.1e-3) than rounding the unpacked weights does (5e-5).
        with torch.device("meta"):
            model = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with ProgressReporter(stderr(), gguf.name, -(-size // MB), unit="MB") as reporter:
            architecture = metadata["general.architecture"]
            fill(model, reader, gguf.name, architecture, lambda done: reporter.advance_to(done / MB))

    special = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding")}
    ends = end_tokens(metadata)
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


def _read_gguf(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """A GGUF file and its metadata by key.

    Raises:
        UserError: it is unreadable, only a part, in another byte order, or scales rotary positions.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        reader.fields.clear()  # an array for each token: as much memory as some models take
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is no readable GGUF file: {one_line(error)}") from error
    if reader.byte_order != "I":
        raise UserError(f"{path.name} is in the byte order of other machines (big-endian): {ELSE}")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise UserError(
            f"{path.name} is one of {parts} files of a model: put them together with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    architecture = metadata.get("general.architecture")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise UserError(f"{path.name} scales its rotary positions, which transformers drops from a GGUF file: {ELSE}")
    return reader, metadata
