"""Single files of data sets on the Hugging Face hub, at a pinned revision."""

from __future__ import annotations

import functools
import hashlib
import re
import time
from pathlib import Path

from tasks.base import TaskError, missing_rows

AGAIN_S = 60.0
"""For so long what could not be downloaded is not asked for again: many tasks may want the same file, and each attempt
waits for a connection."""

_failed: dict[tuple[str, str, str], tuple[float, str]] = {}
"""When and why, by repository, file and revision."""


@functools.cache
def fetch(task: str, repository: str, file: str, revision: str, instead: str) -> Path:
    """A file in the hub's cache, downloaded where it is not there yet.

    Args:
        task: what errors begin with.
        instead: what works without a connection.

    Raises:
        TaskError: it cannot be downloaded, or is damaged.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    when, reason = _failed.get((repository, file, revision), (-AGAIN_S, ""))
    if time.monotonic() - when >= AGAIN_S:
        try:
            path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
            reason = ""
        except (OSError, HTTPError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            _failed[repository, file, revision] = time.monotonic(), reason
    if reason:
        raise TaskError(
            f"{task}: cannot fetch {file} of {repository} from the hub ({reason}); {instead}",
            reason=missing_rows(None),
        )
    # The hub's cache calls a large file by the SHA-256 that the hub gives for it.
    expected = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", expected) and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise TaskError(f"{task}: {path} is damaged: remove it to have it downloaded again")
    return path
