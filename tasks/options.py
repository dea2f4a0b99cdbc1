"""Options of tasks: declared as a model each, checked the same way for all, refused in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import TaskError, nearest

Count = Annotated[int, Field(ge=1)]
"""A whole number of things of which there is at least one."""


def each_once(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Raises :class:`ValueError` where one length is named twice: two documents would have one id."""
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"names one length twice: {list(lengths)}")
    return lengths


Lengths = Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(each_once)]
"""Lengths of prompts, in tokens."""

Model = TypeVar("Model", bound="TaskOptions")


class TaskOptions(BaseModel):
    """What is read from ``TaskSettings.options``; a task names its own model of them in ``Task.Options``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    @classmethod
    def parse(cls: type[Model], task: str, options: Mapping[str, Any]) -> Model:
        """Check options. None is the default; one value may stand for a list of one, and text for a path.

        Raises:
            TaskError: it names the option and what would work.
        """
        for name in options:
            if name not in cls.model_fields:
                raise TaskError(f"{task} has no option {name!r}: {nearest(name, cls.model_fields)}", usage=True)
        given = {name: value for name, value in options.items() if value is not None}
        try:
            return cls(**{name: _shaped(cls.model_fields[name].annotation, value) for name, value in given.items()})
        except ValidationError as error:
            found = error.errors()[0]
            if not found["loc"]:
                raise TaskError(f"{task}: {message_of(found)}", usage=True) from None
            name = str(found["loc"][0])
            if found["type"] == "value_error":
                raise TaskError(f"{task}: {name} {message_of(found)}", usage=True) from None
            wanted = wanted_by(cls, name)
            raise TaskError(f"{task}: {name} must be {wanted}, not {options[name]!r}", usage=True) from None


def _shaped(annotation: Any, value: Any) -> Any:
    """``value`` as a tuple or a path, where ``annotation`` says so and it can be read as one."""
    if get_origin(annotation) is tuple:
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    kinds = (annotation, *get_args(annotation))
    return Path(value) if Path in kinds and isinstance(value, str) else value


def message_of(error: Mapping[str, Any]) -> str:
    """What a validator of ours has said, without pydantic's words around it."""
    return str(error.get("ctx", {}).get("error", error["msg"]))


_KINDS = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "texts"),
    "boolean": ("true or false", "true or false"),
    "object": ("a mapping", "mappings"),
}


def wanted_by(model: type[BaseModel], name: str) -> str:
    """What a field takes, in words: ``whole numbers of at least 2``."""
    schema = value_schema(model, name)
    many = schema.get("type") == "array"
    kind = schema["items"] if many else schema
    if choices := kind.get("enum"):
        return " or ".join(map(str, choices))
    said = "a path" if kind.get("format") == "path" else _KINDS[kind["type"]][many]
    least, above = kind.get("minimum"), kind.get("exclusiveMinimum")
    most, below = kind.get("maximum"), kind.get("exclusiveMaximum")
    bounds = [
        *([f"of at least {least:g}"] if least is not None else []),
        *([f"above {above:g}"] if above is not None else []),
        *([f"up to {most:g}"] if most is not None else []),
        *([f"below {below:g}"] if below is not None else []),
    ]
    return " ".join([said, " and ".join(bounds)]).strip()


def value_schema(model: type[BaseModel], name: str) -> dict[str, Any]:
    """The JSON schema of a field's values, null apart."""
    schema: dict[str, Any] = model.model_json_schema()["properties"][name]
    options = [item for item in schema.get("anyOf", ()) if item.get("type") != "null"]
    return options[0] if options else schema
