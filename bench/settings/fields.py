"""What a setting says of itself, once, and the models that are made of settings.

Everything else comes from there: options of the command line, presets, checks, the fingerprint of a run and its record.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from bench.errors import UserError
from bench.settings.secrets import redacted
from tasks.errors import nearest
from tasks.options import message_of, value_schema

Affects = Literal["answer", "grid", "speed", "nothing"]
"""What a setting changes. ``answer``: answers; two values never share a run folder, it is in the fingerprint.
``grid``: what is asked for, part of what a sample is known by: model, task, document, prompt, cell. ``speed``: time.
"""

Model = TypeVar("Model", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field says beyond its name, type, bounds and default."""

    help: str
    """One sentence or more; the default is said behind it."""
    panel: str
    affects: Affects
    unset: str | None = None
    """The default in words, where it says too little itself."""
    option: str | None = None
    """Its option, where that is not its name."""
    aliases: tuple[str, ...] = ()
    """Other names that it can be given by."""
    flag_only: bool = False
    """No preset may set it: what a file brings must not switch on that code is run."""
    by_content: bool = False
    """A file that counts by what is in it."""
    sparse: bool = False
    """The fingerprint has it only where it is not the default: older folders do not have it."""
    repeated: bool = False
    """Its option may stand several times."""
    argument: bool = False
    """It has no option: what is typed without one is its value, or are its values."""
    short: str | None = None
    """Its option in one letter, such as ``-o``."""
    shown_as: str | None = None
    """What a help shows in the place of the value, such as ``FILE``, where the kind of value says too little."""
    switch: bool = False
    """Its option has no opposite."""
    may_be_empty: bool = False
    """Of a list: no value stands for values of somebody else's."""
    read: Callable[[str, Any], Any] | None = None
    """Its own reader, before the common one: called with the option and the value."""

    def __call__(self, schema: dict[str, Any]) -> None:
        """For pydantic: what a JSON schema says of it."""
        schema["description"] = self.help
        schema["affects"] = self.affects


def setting(default: Any, help: str, panel: str, affects: Affects, **more: Any) -> Any:
    """A field with its :class:`Setting`."""
    return Field(default, json_schema_extra=Setting(help=help, panel=panel, affects=affects, **more))


def again(model: type[BaseModel], name: str, default: Any, **changes: Any) -> Any:
    """A field of another model with another default, and perhaps other words."""
    return Field(default, json_schema_extra=replace(setting_of(model.model_fields[name]), **changes))


def setting_of(field: FieldInfo) -> Setting:
    """What a field says of itself."""
    assert isinstance(field.json_schema_extra, Setting)
    return field.json_schema_extra


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Shape(NamedTuple):
    """How values of a field are written down."""

    kind: type
    """Of one value: int, float, bool, str or Path; anything else stands for itself."""
    many: bool
    optional: bool


class SettingError(UserError):
    """A value of one setting makes no sense."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message, exit_code=2)
        self.name = name


class Settings(BaseModel):
    """Settings of a command. Values may be given as they are, or as text: a list with commas between, a path, a number.

    Raises:
        UserError: a name is unknown, or a value makes no sense (exit code 2); it names the option and what would work.
    """

    # Built when it is first used: a command line needs one model of many.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    not_offered: ClassVar[frozenset[str]] = frozenset()
    """Fields that a command line has no option for."""

    def __init__(self, **values: Any) -> None:
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = self.field_name(key)
            if name in given:
                raise SettingError(name, f"{name} and {key} are the same setting: give one of them")
            given[name] = self.parse(name, value)
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise self._explained(error) from None

    @classmethod
    def field_name(cls, key: str) -> str:
        """The field that ``key`` means: a name, or another spelling. Raises :class:`UserError` for none."""
        names = _names(cls)
        if key not in names:
            raise SettingError(key, f"unknown setting {key!r}: {nearest(key, names)}")
        return names[key]

    @classmethod
    def option(cls, name: str) -> str:
        """The option of a field."""
        return setting_of(cls.model_fields[name]).option or f"--{name.replace('_', '-')}"

    @classmethod
    def parse(cls, name: str, value: Any) -> Any:
        """The value of field ``name`` from text, YAML or Python. Raises :class:`UserError` for the wrong form."""
        field = cls.model_fields[name]
        option = cls.option(name)
        read = setting_of(field).read
        if read is not None and value is not None:
            try:
                value = read(option, value)
            except UserError as error:
                raise SettingError(name, str(error)) from None
        shape = shape_of(field.annotation)
        if value is None:
            if not shape.optional:
                raise SettingError(name, f"{option}: a value is needed")
            return None
        if not shape.many:
            return cls._parse_one(name, shape.kind, value)
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        stripped = [item.strip() if isinstance(item, str) else item for item in items]
        parsed = [cls._parse_one(name, shape.kind, item) for item in stripped if item != ""]
        if not parsed and not (value == () and (shape.optional or setting_of(field).may_be_empty)):
            raise SettingError(name, f"{option}: give at least one value")
        unique: list[Any] = []
        for item in parsed:
            if not any(type(item) is type(other) and item == other for other in unique):
                unique.append(item)
        return tuple(unique)

    @classmethod
    def _parse_one(cls, name: str, kind: type, value: Any) -> Any:
        if not isinstance(value, str) or kind not in (int, float, Path):
            return value
        if kind is Path:
            return Path(value).expanduser()
        try:
            return kind(value)
        except ValueError:
            raise SettingError(name, f"{cls.option(name)}: {value!r} is not {_KINDS[kind]}") from None

    @classmethod
    def _explained(cls, error: ValidationError) -> SettingError:
        """The first thing that pydantic found, in one line."""
        found = error.errors()[0]
        name, value = str(found["loc"][0]), found["input"]
        option = cls.option(name)
        if found["type"] == "value_error":
            return SettingError(name, message_of(found))
        schema = value_schema(cls, name)
        schema = schema.get("items", schema)
        if found["type"] == "literal_error":
            return SettingError(name, f"{option}={value}: use {' or '.join(schema['enum'])}")
        if found["type"] in _OUT_OF_BOUNDS and (said := _bounds(schema)):
            return SettingError(name, f"{option}={value}: give {said}")
        kind = shape_of(cls.model_fields[name].annotation).kind
        if kind is bool:
            return SettingError(name, f"{option}: {value!r} is neither true nor false")
        hint = ""
        if kind in (str, Path) and isinstance(value, int | float):
            hint = f"; in quotes it would be: {str(value).lower()!r}"
        elif kind is int and (bounds := _bounds(schema)):
            hint = f"; give one of {bounds}"
        return SettingError(name, f"{option}: {value!r} is not {_KINDS[kind]}{hint}")

    def changed(self: Model, **values: Any) -> Model:
        """The same settings with some others."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **values})

    def to_json(self) -> dict[str, Any]:
        """As JSON, with paths as text, lists as lists, and what is secret left out."""
        return {name: to_json(getattr(self, name)) for name in type(self).model_fields}

    def fingerprint(self) -> dict[str, Any]:
        """Every setting that changes an answer and is not part of what a sample is known by; files by their content."""
        found = {}
        for name, field in type(self).model_fields.items():
            own, value = setting_of(field), getattr(self, name)
            if own.affects == "answer" and not (own.sparse and value == field.default):
                found[name] = file_hash(value) if own.by_content else to_json(value)
        return found


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
_OUT_OF_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def _bounds(schema: dict[str, Any]) -> str:
    """``2 or more``, ``more than 0, up to 1``: what a number must be; empty where it may be any."""
    said = [
        *([f"{schema['minimum']:g} or more"] if "minimum" in schema else []),
        *([f"more than {schema['exclusiveMinimum']:g}"] if "exclusiveMinimum" in schema else []),
        *([f"up to {schema['maximum']:g}"] if "maximum" in schema else []),
        *([f"less than {schema['exclusiveMaximum']:g}"] if "exclusiveMaximum" in schema else []),
    ]
    return ", ".join(said)


@cache
def _names(model: type[Settings]) -> dict[str, str]:
    """Every spelling of every field."""
    spelled = {name: name for name in model.model_fields}
    for name, field in model.model_fields.items():
        spelled |= dict.fromkeys(setting_of(field).aliases, name)
    return spelled


def shape_of(annotation: Any) -> Shape:
    """The shape of a field from its annotation: ``tuple[int, ...] | None`` is many whole numbers, or nothing."""
    kinds = [item for item in _alternatives(annotation) if item is not type(None)]
    optional = len(kinds) < len(_alternatives(annotation))
    (kind,) = kinds
    many = get_origin(kind) is tuple
    if many:
        kind = _alternatives(get_args(kind)[0])[0]
    if get_origin(kind) is Literal:
        kind = type(get_args(kind)[0])
    return Shape(kind, many, optional)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values that a field can have, where they are named one by one; else none."""
    return next((get_args(item) for item in _alternatives(annotation) if get_origin(item) is Literal), ())


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [item for part in get_args(annotation) for item in _alternatives(part)]
    return [annotation]


def to_json(value: Any) -> Any:
    """A value of a setting as JSON; an empty list is null, and what is secret in a mapping is left out."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, tuple):
        return [to_json(item) for item in value] or None
    return redacted(value) if isinstance(value, dict) else value


def file_hash(path: Path | None) -> str | None:
    """SHA-256 of a file, None where there is none."""
    import hashlib

    return None if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()


def offered(model: type[Settings]) -> Iterable[str]:
    """The fields that a command line has options for, those of the command alone first."""
    names = [name for name in model.model_fields if name not in model.not_offered]
    above = model.__base__
    inherited = above.model_fields if above is not None and issubclass(above, Settings) else {}
    return [*(name for name in names if name not in inherited), *(name for name in names if name in inherited)]
