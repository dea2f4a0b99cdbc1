"""Presets: settings by name or from a YAML file, and what wins of a default, a preset and what was typed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, overload

from bench.errors import UserError
from bench.settings.fields import SettingError, Settings, setting_of, shape_of
from bench.settings.run import RunConfig
from tasks.errors import nearest
from tasks.options import value_schema

DESCRIPTION = "description"
Model = TypeVar("Model", bound=Settings)


def preset_names() -> list[str]:
    """Names of the presets that come with the suite."""
    folder = resources.files("bench").joinpath("presets")
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """What a preset says, by name or of a YAML file of the user's, as it stands there.

    Raises:
        UserError: unknown preset, unreadable file, not a mapping.
    """
    import yaml

    if name.endswith((".yaml", ".yml")):
        path: Any = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"preset file {name} does not exist", exit_code=2)
    elif name in preset_names():
        path = resources.files("bench").joinpath("presets", f"{name}.yaml")
    else:
        raise UserError(f"unknown preset {name!r}: {nearest(name, preset_names())}", exit_code=2)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"preset {name}: not valid YAML: {' '.join(str(error).split())}", exit_code=2) from None
    except OSError as error:
        raise UserError(f"preset {name}: cannot be read ({error.strerror})", exit_code=2) from None
    if not isinstance(content, dict):
        raise UserError(f"preset {name}: needs lines of the form 'setting: value'", exit_code=2)
    return {str(key): value for key, value in content.items()}


def load_preset(name: str, model: type[Settings] = RunConfig) -> dict[str, Any]:
    """Settings of a preset by field.

    Raises:
        UserError: as :func:`read_preset`; it names a setting that is unknown, given twice or only an option's.
    """
    settings: dict[str, Any] = {}
    for key, value in read_preset(name).items():
        if key == DESCRIPTION:
            continue
        spelled = key.replace("-", "_")
        try:
            field = model.field_name(spelled)
        except SettingError as error:
            raise UserError(f"preset {name}: {error}", exit_code=2) from None
        if setting_of(model.model_fields[field]).flag_only:
            option = model.option(field)
            said = f"preset {name}: no setting {spelled!r}: it decides what code is run, so only {option} sets it"
            raise UserError(said, exit_code=2)
        if field in settings:
            raise UserError(f"preset {name}: {field} is given twice, once as {key}", exit_code=2)
        settings[field] = value
    return settings


def preset_description(name: str) -> str:
    """The ``description`` of a preset."""
    return str(read_preset(name).get(DESCRIPTION, ""))


@overload
def resolve(flags: Mapping[str, Any], preset: str | None) -> tuple[RunConfig, dict[str, str]]: ...


@overload
def resolve(flags: Mapping[str, Any], preset: str | None, model: type[Model]) -> tuple[Model, dict[str, str]]: ...


def resolve(
    flags: Mapping[str, Any], preset: str | None, model: type[Settings] = RunConfig
) -> tuple[Settings, dict[str, str]]:
    """The settings of a command and where each came from: ``default``, ``preset NAME`` or ``flag``.

    Args:
        flags: what was typed; None means not given.
        preset: names and files, separated by commas; of two that set the same, the later one wins.

    Raises:
        UserError: a preset cannot be used, or a value makes no sense.
    """
    values: dict[str, Any] = {}
    origin = dict.fromkeys(model.model_fields, "default")
    sources = [] if preset is None else [name.strip() for name in preset.split(",") if name.strip()]
    if preset is not None and not sources:
        raise UserError("--preset: give at least one value", exit_code=2)
    for source in sources:
        for name, value in load_preset(source, model).items():
            values[name] = value
            origin[name] = f"preset {source}"
    for key, value in flags.items():
        if value is not None:
            name = model.field_name(key)
            values[name] = value
            origin[name] = "flag"
    try:
        return model(**values), origin
    except SettingError as error:
        where = origin.get(error.name, "flag")
        raise UserError(f"{where}: {error}" if where.startswith("preset") else str(error), exit_code=2) from None


def preset_schema() -> dict[str, Any]:
    """A JSON schema of presets, for editors: https://json-schema.org."""
    full = RunConfig.model_json_schema()
    properties: dict[str, Any] = {DESCRIPTION: {"type": "string", "description": "One line for list presets."}}
    for name, field in RunConfig.model_fields.items():
        own = setting_of(field)
        if own.flag_only:
            continue
        shape = shape_of(field.annotation)
        values = [value_schema(RunConfig, name)]
        if shape.many:
            values += [values[0]["items"], {"type": "string"}]
        elif own.read is not None:
            values += [{"type": "integer"}, {"type": "object"}]
        if shape.optional:
            values.append({"type": "null"})
        for spelled in (name, *own.aliases):
            properties[spelled.replace("_", "-")] = properties[spelled] = {"description": own.help, "anyOf": values}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A preset of arkv-bench",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": full.get("$defs", {}),
    }
