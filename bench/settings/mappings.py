"""Mappings as they are typed: ``key=value,...``, YAML or JSON."""

from __future__ import annotations

from typing import Any

from bench.errors import UserError


def read_mapping(option: str, text: str | None) -> dict[str, Any]:
    """The mapping in ``text``; values are those of YAML. Raises :class:`UserError` where it holds none."""
    import yaml

    if not text:
        return {}
    if not text.lstrip().startswith("{"):
        pairs = [item.partition("=") for item in text.split(",")]
        if wrong := [key for key, equals, _ in pairs if not key.strip() or not equals]:
            raise UserError(f"{option}: {wrong[0]!r} is not of the form key=value", exit_code=2)
        text = "{" + ", ".join(f"{key.strip()}: {value}" for key, _, value in pairs) + "}"
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{option}: {' '.join(str(error).split())}", exit_code=2) from None
    if not isinstance(content, dict):
        raise UserError(f"{option}: {text!r} is no mapping", exit_code=2)
    return {str(key): value for key, value in content.items()}
