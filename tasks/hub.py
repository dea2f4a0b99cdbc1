"""Single files of data sets on the Hugging Face hub, at a pinned revision."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

from tasks.base import TaskError, missing_rows


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

    try:
        path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (OSError, HTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TaskError(
            f"{task}: cannot fetch {file} of {repository} from the hub ({type(error).__name__}: {reason}); {instead}",
            reason=missing_rows(None),
        ) from error
    # The hub's cache calls a large file by the SHA-256 that the hub gives for it.
    expected = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", expected) and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise TaskError(f"{task}: {path} is damaged: remove it to have it downloaded again")
    return path
