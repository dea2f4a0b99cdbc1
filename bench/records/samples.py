"""``samples.jsonl``: the samples of a run by what they answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.records.files.json_ import read_lines
from bench.records.packed import packed
from bench.records.sample import ANSWERED, REMEDY, SAMPLE, Key, Measured, Sample


class Samples(Mapping[Key, Measured]):
    """The samples of a file by what they answer, without their answers, which are read when they are asked for.

    Args:
        path: the file; may be absent, and None is no file at all.
        answered: refuse lines without an answer, which only a baseline may have.

    Raises:
        UserError: a line makes no sense (file, line and field are named).
    """

    def __init__(self, path: Path | None = None, *, answered: bool = False) -> None:
        self.path = path
        self._samples: dict[Key, Measured] = {}
        self._known: dict[Any, Any] = {}
        if path is None:
            return
        adapter = ANSWERED if answered else SAMPLE
        for place, sample in read_lines(path, lambda line: adapter.validate_json(line, strict=True), REMEDY):
            self.add(sample, place)

    def add(self, sample: Sample, place: int) -> None:
        """One more, whose line begins at byte ``place``."""
        small = packed(sample, place, self._known)
        self._samples[small.key] = small

    def whole(self, wanted: Iterable[Measured]) -> Iterator[Sample]:
        """These with their answers, read one by one."""
        if self.path is None or not self._samples:
            return
        with open(self.path, "rb") as file:
            for item in wanted:
                file.seek(item.place)
                yield SAMPLE.validate_json(file.readline(), strict=True)

    def __getitem__(self, key: Key) -> Measured:
        return self._samples[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)
