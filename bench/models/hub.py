"""Models of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.models.library import one_line
from bench.models.references import ModelSource, check_folder


def fetch_hub(source: ModelSource, trust_remote_code: bool, weights: bool) -> Path:
    """The folder of a snapshot in the hub's cache. Raises :class:`UserError`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = source.name
    files = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    settings: dict[str, Any] = {
        "revision": source.revision,
        "allow_patterns": [*files, "*.py"] if trust_remote_code else files,
        # Sub-folders and "consolidated" files repeat the weights in other formats.
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    try:
        try:
            folder = Path(snapshot_download(name, **settings))
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            # Without a connection it looks into its cache by itself for a branch or tag, not always for a commit.
            folder = Path(snapshot_download(name, local_files_only=True, **settings))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms on the hub, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"The hub has no model {name} (or it is private: log in with `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {source.revision}") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is neither a local folder nor whole in the hub's cache here, and the hub is out of reach "
            "(no connection, or HF_HUB_OFFLINE is set)"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{name} could not be fetched from the hub: {one_line(error)}") from error
    check_folder(folder, f"{name} at {source.revision or 'its newest revision'}", weights)
    return folder
