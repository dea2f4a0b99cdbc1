"""Options of a command line, made from the model of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from bench.settings.fields import Settings, choices_of, offered, setting_of, shape_of, to_json

Command = TypeVar("Command", bound=Callable[..., None])


def takes(model: type[Settings]) -> Callable[[Command], Command]:
    """The command with an option for every field of ``model`` in the place of its ``**typed``.

    What was not typed is None there, so that a preset's value or the default holds.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = [_parameter(model, name) for name in offered(model)]
        parameters += [
            item.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for item in own.values()
            if item.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in parameters}
        return command

    return decorate


def _parameter(model: type[Settings], name: str) -> inspect.Parameter:
    field = model.model_fields[name]
    own, shape = setting_of(field), shape_of(field.annotation)
    option = model.option(name)
    names = [option, *(f"--{alias.replace('_', '-')}" for alias in own.aliases), *([own.short] if own.short else [])]
    # Text, which the model reads as it reads a preset's: there is one message for what makes no sense.
    kind: Any = list[str] if own.repeated else str
    metavar: str | None = own.shown_as or _metavar(field.annotation) + (",..." if shape.many else "")
    if shape.kind is bool:
        names, kind, metavar = [option if own.switch else f"{option}/--no-{option[2:]}"], bool, None
    said: dict[str, Any] = {"help": help_of(field), "rich_help_panel": own.panel, "show_default": False}
    shown = typer.Argument(metavar=metavar, **said) if own.argument else typer.Option(*names, metavar=metavar, **said)
    needed = field.is_required()
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if needed else None,
        annotation=Annotated[kind if needed else kind | None, shown],
    )


def _metavar(annotation: Any) -> str:
    """What stands for a value in a help: its kind, or the values that there are."""
    choices = choices_of(annotation)
    return "|".join(map(str, choices)) if choices else _METAVARS.get(shape_of(annotation).kind, "TEXT")


_METAVARS = {int: "INT", float: "FLOAT", Path: "PATH"}


def help_of(field: FieldInfo) -> str:
    """What a setting does, and its default."""
    own = setting_of(field)
    default = own.unset if own.unset is not None or field.is_required() else _shown(field.default)
    return own.help if not default or "Default:" in own.help else f"{own.help} Default: {default}."


def _shown(default: Any) -> str | None:
    if isinstance(default, bool):
        return "yes" if default else "no"
    value = to_json(default)
    return ",".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def given(model: type[Settings], typed: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, as ``model`` and :func:`bench.settings.presets.resolve` take it."""
    found = {}
    for name, value in typed.items():
        # An option that may be repeated may also name several at once; a comma in an argument is its own.
        joined = isinstance(value, list) and not setting_of(model.model_fields[name]).argument
        text = ",".join(value) if joined else value
        if text not in (None, "", []):
            found[name] = text
    return found


PRESET = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Settings by name (see list presets) or from a YAML file; of several the last wins, and flags win.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
FRESH = Annotated[
    bool, typer.Option("--fresh", help="Forget what an earlier one left in the folder.", rich_help_panel="Output")
]
