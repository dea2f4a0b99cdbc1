"""``states.json``: maps of who became Original, Quantized and Evicted in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from bench.names import STATES
from bench.records.files.json_ import json_text, read_json
from bench.records.files.text import write_atomic
from bench.records.version import FORMAT_VERSION, Versioned

_CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[int, Field(ge=1)]
Shares = Annotated[list[list[Annotated[float, Field(ge=0)]]], Field(min_length=1)]


class StatesMap(BaseModel):
    """Shares of KV heads that hold the tokens of a prompt, by layer and by bin of neighbouring positions."""

    model_config = _CLOSED

    tokens: Positive
    heads: Positive
    layers: list[int]
    original: Shares
    """[L][bins]; what is neither Original nor Quantized is Evicted."""
    quantized: Shares

    @model_validator(mode="after")
    def _same_shape(self) -> StatesMap:
        shapes = {tuple(map(len, shares)) for shares in (self.original, self.quantized)}
        bins = set(next(iter(shapes)))
        if len(shapes) != 1 or len(bins) != 1 or bins == {0} or len(self.layers) != len(self.original):
            raise ValueError("layers, original and quantized differ in their numbers of layers or bins")
        return self


class MapRecord(BaseModel):
    """The map of one document of a task and one cell."""

    model_config = _CLOSED

    model: str
    task: str
    document: str
    cell: str
    label: str
    """Of the cell."""
    map: StatesMap


class MapsFile(Versioned):
    """The whole file."""

    maps: list[MapRecord]


_MAPS = TypeAdapter(MapsFile)


def read_maps(folder: Path) -> list[MapRecord]:
    """States maps of a folder; none without a file.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / STATES
    return read_json(file, _MAPS, "a file of states maps").maps if file.is_file() else []


def write_maps(folder: Path, maps: Sequence[MapRecord]) -> None:
    """Add maps to those of a folder; one of the same model, task and cell is replaced.

    They are in the order of these names, whichever worker ends first.
    """
    together = {(item.model, item.task, item.cell): item for item in [*read_maps(folder), *maps]}
    content = {"format_version": FORMAT_VERSION, "maps": [together[key].model_dump() for key in sorted(together)]}
    write_atomic(folder / STATES, json_text(content, indent=None))
