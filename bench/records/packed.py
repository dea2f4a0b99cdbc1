"""Samples in little memory: a run holds what it has measured of all of them, without their answers, until it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from math import isnan
from struct import Struct, pack, unpack_from
from typing import Any, cast

from bench.records.sample import LARGEST, Key, Measured, own_id

_KEY = ("model", "task", "document", "prompt_sha256", "cell")
_COMMON = (
    *("method", "quant_format", "budget_unit", "cache_size", "cache_ratio", "window_size"),
    *("truncated", "prefills", "question", "answers", "repeat", "start", "kind"),
)
"""What many samples have in common, which is held once."""
_OTHERS = [item for item in fields(Measured) if item.name not in (*_KEY, *_COMMON, "scores", "source")]
"""Numbers, in 8 bytes each."""
_WHOLE = [item.name for item in _OTHERS if str(item.type).startswith(("Count", "int"))]
_REAL = [item.name for item in _OTHERS if item.name not in _WHOLE]
_NUMBERS = Struct(f"={len(_WHOLE)}q{len(_REAL)}d")
_UNKNOWN, _NAN = -1 - LARGEST, float("nan")
"""What None is written as: no sample has them, since its numbers are finite and counts fit into 8 bytes."""


def packed(sample: Measured, place: int, known: dict[Any, Any]) -> Measured:
    """What looks like the sample, without its answer.

    Args:
        place: byte of the file that its line begins at.
        known: what samples have in common; grows.
    """
    found = _Packed()
    found.key, found.source = sample.key, sample.source
    common = (*(getattr(sample, name) for name in _COMMON), tuple(sample.scores))
    found._common = known.setdefault(common, common)
    whole = [place if name == "place" else getattr(sample, name) for name in _WHOLE]
    real = [getattr(sample, name) for name in _REAL]
    numbers = _NUMBERS.pack(*_or(_UNKNOWN, whole), *_or(_NAN, real))
    found._numbers = numbers + _scores(sample.scores)
    return cast(Measured, found)


def _or(unknown: float, values: Iterable[Any]) -> list[Any]:
    return [unknown if value is None else value for value in values]


def _scores(scores: dict[str, float | None]) -> bytes:
    return pack(f"={len(scores)}d", *_or(_NAN, scores.values()))


class _Packed:
    """Has every attribute of :class:`Measured`, and those that copies of a sample differ in can be set."""

    __slots__ = ("_common", "_numbers", "key", "source")
    key: Key
    source: str | None
    _common: tuple[Any, ...]
    """The last are the names of the scores."""
    _numbers: bytes
    """Whole ones, real ones, scores."""

    @property
    def own_id(self) -> str:
        return own_id(self.key[2], self._common[_COMMON.index("repeat")])

    @property
    def scores(self) -> dict[str, float | None]:
        names = self._common[-1]
        values = unpack_from(f"={len(names)}d", self._numbers, _NUMBERS.size)
        return {name: None if isnan(value) else value for name, value in zip(names, values, strict=True)}

    @scores.setter
    def scores(self, scores: dict[str, float | None]) -> None:
        self._common = (*self._common[:-1], tuple(scores))
        self._numbers = self._numbers[: _NUMBERS.size] + _scores(scores)


def _of_key(place: int) -> property:
    def read(self: _Packed) -> str:
        return self.key[place]

    def write(self: _Packed, value: str) -> None:
        self.key = cast(Key, (*self.key[:place], value, *self.key[place + 1 :]))

    return property(read, write)


def _of_common(place: int) -> property:
    return property(lambda self: self._common[place])


def _whole(place: int) -> property:
    def read(self: _Packed) -> int | None:
        (value,) = unpack_from("=q", self._numbers, 8 * place)
        return None if value == _UNKNOWN else value

    return property(read)


def _real(place: int) -> property:
    def read(self: _Packed) -> float | None:
        (value,) = unpack_from("=d", self._numbers, 8 * place)
        return None if isnan(value) else value

    return property(read)


for _place, _name in enumerate(_KEY):
    setattr(_Packed, _name, _of_key(_place))
for _place, _name in enumerate(_COMMON):
    setattr(_Packed, _name, _of_common(_place))
for _place, _name in enumerate([*_WHOLE, *_REAL]):
    setattr(_Packed, _name, (_whole if _name in _WHOLE else _real)(_place))
