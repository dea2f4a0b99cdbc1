"""The grid of a run: which cache methods, at which budget and with which settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from arkv import FORMATS, METHODS, CacheConfig, ConfigError
from bench.errors import OthersCode, UserError
from bench.methods.base import Method
from bench.methods.cell import Cell
from bench.methods.full import Full
from bench.methods.names import check_methods, library_of
from bench.methods.prompt import Asked
from bench.methods.tristate import TriState
from bench.methods.variants import Variant
from bench.names import FULL, HF, KVPRESS
from tasks.errors import nearest


class OwnMethod(NamedTuple):
    """A method of the user's own and the version of its code."""

    method: Method
    version: str


def full_cell() -> Cell:
    """The baseline."""
    return Cell(FULL, Full())


def tristate_cell(method: str, config: CacheConfig) -> Cell:
    """A tri-state method with settings."""
    return Cell(method, TriState(method, config), Asked(config.budget_unit, config.cache_size, config.cache_ratio))


def is_known(method: str) -> bool:
    """Whether ``method`` is one of this suite or asks for a library's."""
    return method == FULL or method in METHODS or library_of(method) is not None


def check_names(methods: Iterable[str], formats: Iterable[str], own: Iterable[str] = ()) -> None:
    """Raises :class:`UserError` (exit code 2) for the first unknown method or format, naming the nearest known one.

    ``own`` are methods of the user's own.
    """
    check_methods(methods, own)
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown quant format {name!r}: {nearest(name, FORMATS)}", exit_code=2)


def other_method(name: str, own: Mapping[str, OwnMethod]) -> tuple[Method, str]:
    """A method of a plugin or a library, and the version of its code.

    Raises:
        UserError: unknown name (the nearest known one is named), or a library that is not installed (the extra is).
    """
    if name in own:
        return own[name]
    library = library_of(name)
    if library == HF:
        from bench.methods.hf import make_hf

        return make_hf(name)
    if library == KVPRESS:
        from bench.methods.kvpress import make_press

        return make_press(name)
    raise UserError(f"unknown method {name!r}: third-party methods begin with {HF}: or {KVPRESS}:", exit_code=2)


def other_cell(name: str, own: Mapping[str, OwnMethod] | None = None, **budget: Any) -> Cell:
    """A method of a plugin or a library with its budget, if it has one. Raises as :func:`other_method`.

    Args:
        budget: ``unit`` and either ``cache_size`` or ``cache_ratio``.
    """
    impl, version = other_method(name, own or {})
    return Cell(name, impl, Asked(**budget) if impl.has_budget else Asked(), version)


def own_cell(name: str, base: str, own: OwnMethod, values: Mapping[str, Any], asked: Asked) -> Cell:
    """A user's own method ``base`` with other settings, under a name of its own.

    Raises :class:`UserError` for a setting that it does not have, and where its code refuses a value.
    """
    space = own.method.settings_space
    for key in values:
        if key not in space:
            meant = nearest(key, space) if space else "the method declares no settings_space"
            raise UserError(f"{name}: unknown setting {key!r} of {base}: {meant}", exit_code=2)
    with OthersCode(base, placed=True):
        impl = own.method.with_settings(**values)
    return Cell(name, impl, asked if impl.has_budget else Asked(), own.version, dict(values))


def grid(
    methods: Sequence[str | Variant],
    budgets: Sequence[Mapping[str, Any]],
    window_sizes: Sequence[int],
    formats: Sequence[str] | None,
    settings: Mapping[str, Any],
    own: Mapping[str, OwnMethod] | None = None,
) -> list[Cell]:
    """All cells in the order asked for, without the combinations that would be the same cache twice.

    Args:
        methods: names, and variants of the suite's and the user's own methods, which have a row under their own name.
        budgets: ``cache_size`` or ``cache_ratio`` of each budget.
        window_sizes: none take each method's own.
        formats: formats of Quantized tokens; None takes each method's own.
        settings: further settings of the cache, the same for all.
        own: methods of the user's own by name.

    Raises:
        UserError: unknown method or format, or a method of others that is not installed.
        arkv.ConfigError: settings that make no sense together.
    """
    own = {} if own is None else own
    check_names([item for item in methods if isinstance(item, str)], formats or (), own)
    cells: dict[str, Cell] = {}
    for method in methods:
        if isinstance(method, Variant):
            found = _variant_cells(method, budgets, window_sizes, formats, settings, own)
        elif method == FULL:
            found = [full_cell()]
        elif method in METHODS:
            found = _tristate_cells(method, method, {}, budgets, window_sizes, formats, settings)
        else:
            unit = settings.get("budget_unit", "tokens")
            found = [other_cell(method, own, unit=unit, **budget) for budget in budgets]
        cells |= {cell.key: cell for cell in found}
    return list(cells.values())


def _tristate_cells(
    name: str,
    base: str,
    special: Mapping[str, Any],
    budgets: Sequence[Mapping[str, Any]],
    window_sizes: Sequence[int],
    formats: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> list[Cell]:
    """Cells of one method of the suite; ``special`` are settings that win over everything else."""
    quantizes = {**METHODS[base], **special}.get("original_share") != 1.0
    # What makes the method is not open to settings.
    mine = {key: value for key, value in settings.items() if key not in METHODS[base]}
    found = []
    for budget in budgets:
        if special.keys() & {"cache_size", "cache_ratio"}:
            budget = {}
        for window_size in window_sizes or (None,):
            for quant_format in formats if formats and quantizes else (None,):
                chosen = {"window_size": window_size, "quant_format": quant_format}
                given = {key: value for key, value in chosen.items() if value is not None}
                config = CacheConfig.for_method(base, **{**budget, **given, **mine, **special})
                found.append(tristate_cell(name, config))
    return found


def _variant_cells(
    variant: Variant,
    budgets: Sequence[Mapping[str, Any]],
    window_sizes: Sequence[int],
    formats: Sequence[str] | None,
    settings: Mapping[str, Any],
    own: Mapping[str, OwnMethod],
) -> list[Cell]:
    """Cells of a variant. Raises :class:`UserError` for a name that is taken, and a base or settings that cannot be."""
    name, base = variant.name, variant.base
    if is_known(name) or name in own:
        raise UserError(f"variant {name!r}: there is a method of that name: give another one", exit_code=2)
    if base in own:
        unit = settings.get("budget_unit", "tokens")
        return [own_cell(name, base, own[base], variant.settings, Asked(unit, **budget)) for budget in budgets]
    if base not in METHODS:
        known = ", ".join([*METHODS, *own])
        raise UserError(f"variant {name!r}: its base {base!r} is none of {known}", exit_code=2)
    try:
        return _tristate_cells(name, base, variant.settings, budgets, window_sizes, formats, settings)
    except ConfigError as error:
        raise UserError(f"variant {name!r}: {error}", exit_code=2) from None
