"""Options of a command line, made from the model of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from bench.settings.fields import Settings, offered, setting_of, shape_of, to_json

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
    names = [option, *(f"--{alias.replace('_', '-')}" for alias in own.aliases)]
    # Text, which the model reads as it reads a preset's: there is one message for what makes no sense.
    kind: Any = str
    metavar: str | None = _METAVARS.get(shape.kind, "TEXT") + (",..." if shape.many else "")
    if shape.kind is bool:
        names, kind, metavar = [f"{option}/--no-{option[2:]}"], bool, None
    elif own.repeated:
        kind = list[str]
    shown = typer.Option(*names, help=help_of(field), rich_help_panel=own.panel, metavar=metavar, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown]
    )


_METAVARS = {int: "INT", float: "FLOAT", Path: "PATH"}


def help_of(field: FieldInfo) -> str:
    """What a setting does, and its default."""
    own = setting_of(field)
    default = own.unset if own.unset is not None else _shown(field.default)
    return own.help if default is None or "Default:" in own.help else f"{own.help} Default: {default}."


def _shown(default: Any) -> str | None:
    if isinstance(default, bool):
        return "yes" if default else "no"
    value = to_json(default)
    return ",".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def given(typed: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, as :func:`bench.settings.presets.resolve` takes it."""
    # An option that may be repeated may also name several at once.
    joined = {name: ",".join(value) if isinstance(value, list) else value for name, value in typed.items()}
    return {name: value for name, value in joined.items() if value is not None and value != ""}


PRESET = Annotated[
    str | None,
    typer.Option(
        help="Settings by name (see list presets) or from a YAML file; of several the last wins, and flags win.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
FRESH = Annotated[
    bool, typer.Option("--fresh", help="Forget what an earlier one left in the folder.", rich_help_panel="Output")
]
