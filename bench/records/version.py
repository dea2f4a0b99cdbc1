"""The version of a folder's format, which its ``record.json`` names for all files beside it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

FORMAT_VERSION = 3
"""What is written now.

1: the first. Folders of ``arkv-bench speed`` and files of states maps did not say so.
2: the record lists the starts of its run, and each sample names the one that it was measured in.
3: prompts are kept, in ``documents.jsonl``, and samples have their answers token by token (``token_texts``).
"""


def _readable(version: int) -> int:
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"of another arkv-bench: it has format {version}, this one reads 1 to {FORMAT_VERSION}")
    return version


class Versioned(BaseModel):
    """A file that names its format; without it is of the first. What is not known here is kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    format_version: Annotated[int, AfterValidator(_readable)] = 1
