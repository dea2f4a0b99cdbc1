"""transformers as it is used here: without bars, its errors in one line, no weights missing."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from bench.errors import OthersCode, UserError


def check_complete(info: Mapping[str, Any], name: str) -> None:
    """Refuse a model with weights missing: transformers only warns, and runs with random ones in their place."""
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}")


def load_transformers() -> Any:
    """transformers without progress bars, as ``Any``: its annotations lag behind what it returns."""
    import transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    return library


@contextlib.contextmanager
def transformers_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises on files or settings it cannot use, and whatever a model's own code raises, into a
    :class:`UserError`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    broken = (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    )
    try:
        with OthersCode(what, *broken, placed=True):
            yield
    except broken as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{what}: it brings its own code, which runs only with trust_remote_code") from error
        raise UserError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, shortened to a line."""
    text = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, 300, placeholder=" ...")
