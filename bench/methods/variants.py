"""Variants of a method: settings of a cache under a name of their own, as rows of the same table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.errors import UserError

NAME, BASE = "name", "base"


class Variant(BaseModel):
    """A tri-state method, or one of a plugin, with some settings of its own, and a name that its row has.

    Further fields are settings of :class:`arkv.CacheConfig`, which checks them, or of the plugin's ``settings_space``.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str
    base: str
    """``window``, ``origin``, ``quant``, ``mix`` or a method of a plugin."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is different from the base method."""
        return dict(self.model_extra or {})


def read_methods(option: str, value: Any) -> Any:
    """Methods, and mappings among them as :class:`Variant`. Raises :class:`UserError` for one that is none."""
    items = value if isinstance(value, list | tuple) else [value] if isinstance(value, Mapping) else None
    if items is None:
        return value
    return [_variant(option, item) if isinstance(item, Mapping) else item for item in items]


def _variant(option: str, item: Mapping[Any, Any]) -> Variant:
    given = {str(key).replace("-", "_"): value for key, value in item.items()}
    for key, example in ((NAME, "mix-equal"), (BASE, "mix")):
        if not isinstance(given.get(key), str) or not given[key]:
            raise UserError(
                f"{option}: a variant needs a {key}, such as {key}: {example}, in {dict(item)}", exit_code=2
            )
    name = given[NAME]
    if set(name) & set(":, "):
        raise UserError(f"{option}: the name of a variant has no colon, comma or space: {name!r}", exit_code=2)
    return Variant(**given)


def check_unique(methods: Sequence[str | Variant]) -> None:
    """Raises :class:`UserError` where two methods have one name."""
    seen: dict[str, str | Variant] = {}
    for item in methods:
        name = name_of(item)
        if name in seen:
            raise UserError(
                f"--methods: there are two methods named {name!r}: give a variant another name", exit_code=2
            )
        seen[name] = item


def name_of(method: str | Variant) -> str:
    """The name that a method's row has."""
    return method if isinstance(method, str) else method.name
