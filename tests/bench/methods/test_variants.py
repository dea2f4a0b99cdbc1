"""Variants: rows of their own, with any setting of a cache."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arkv import METHODS, CacheConfig
from bench.commands.first_look import first_look
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.methods.grid import grid
from bench.methods.variants import Variant
from bench.runs.run import execute
from bench.settings.presets import load_preset, resolve
from bench.settings.run import RunConfig
from tests.bench.conftest import read_lines

CHANGES: dict[str, Any] = {
    "cache_size": 100,
    "cache_ratio": 0.3,
    "budget_unit": "bytes",
    "layer_budgets": "oq",
    "head_budgets": "all",
    "sure_share": 0.3,
    "stream_norm": True,
    "window_size": 7,
    "n_recent": 5,
    "n_sink": 3,
    "ranking": "recency",
    "original_share": 0.4,
    "quant_format": "int4",
    "tau1": 2.5,
    "tau2": 2.5,
    "tau3": 2.5,
    "importance": "mean_max",
    "gamma": 1.5,
    "query_span": 16,
    "query_stride": 3,
    "span_weight": 0.7,
    "value_norm": True,
    "pool_width": 9,
    "max_pool_width": 9,
    "decode_importance": "mean",
    "decode_rate": 0.2,
    "attention": "reconstruct",
}


def cells(*methods: Any, **settings: Any) -> list[Cell]:
    run = RunConfig(methods=methods, full=False, **{"cache_size": (64,), "window_size": (8,), **settings})
    return grid(run.measured_methods, run.budgets, run.window_size, run.quant_format, run.method_settings)


def config_of(cell: Cell) -> CacheConfig:
    found = cell.impl.cache_config
    assert found is not None
    return found


def test_every_setting_of_a_cache_can_be_changed() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(CacheConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_reaches_the_cache_and_nothing_else_changes(name: str) -> None:
    needs = {"budget_unit": "bytes", "original_share": 0.1}
    if name == "stream_norm":
        needs |= {"head_budgets": "all", "importance": "replay"}
    needy = ("budget_unit", "head_budgets", "stream_norm")
    more = {key: item for key, item in needs.items() if key != name} if name in needy else {}
    plain, variant = cells("mix", {"name": "other", "base": "mix", name: CHANGES[name], **more})
    assert (plain.method, variant.method) == ("mix", "other")
    assert getattr(config_of(variant), name) == CHANGES[name]
    assert plain.key != variant.key
    if name not in ("cache_ratio", *needy):
        assert dataclasses.replace(config_of(variant), **{name: getattr(config_of(plain), name)}) == config_of(plain)


def test_a_variant_wins_over_the_settings_of_the_run_and_has_the_others() -> None:
    own = {"name": "own", "base": "mix", "quant-format": "int4", "window_size": 16}
    (mine,) = cells(own, quant_format="int8,fp8", window_size="8,32", tau1=3.0, cache_size="64")
    assert (config_of(mine).quant_format, config_of(mine).window_size, config_of(mine).tau1) == ("int4", 16, 3.0)
    both = cells({"name": "own", "base": "quant"}, quant_format="int8,fp8")
    assert [config_of(cell).quant_format for cell in both] == ["int8", "fp8"]
    assert config_of(both[0]).original_share == METHODS["quant"]["original_share"]


def test_equal_settings_under_two_names_are_two_rows() -> None:
    first, second = cells({"name": "a", "base": "mix"}, {"name": "b", "base": "mix"})
    assert first.key != second.key
    assert (first.label.split()[0], second.label.split()[0]) == ("a", "b")


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({"name": "x", "base": "mix", "layer_budget": "equal"}, "variant 'x': unknown setting 'layer_budget': did you"),
        ({"name": "x", "base": "mix", "pool_width": 4}, "variant 'x': pool_width=4: use an odd number"),
        ({"name": "x", "base": "mix", "tau1": "high"}, "variant 'x': tau1='high': use a number"),
        ({"name": "x", "base": "full"}, "variant 'x': its base 'full' is none of window, origin, quant, mix"),
        ({"name": "x", "base": "kvpress:snapkv"}, "variant 'x': its base 'kvpress:snapkv' is none of"),
        ({"name": "mix", "base": "quant"}, "variant 'mix': there is a method of that name"),
        ({"name": "full", "base": "quant"}, "variant 'full': there is a method of that name"),
        ({"name": "hf:x", "base": "quant"}, "has no colon, comma or space: 'hf:x'"),
        ({"name": "x"}, "a variant needs a base, such as base: mix"),
        ({"base": "mix"}, "a variant needs a name, such as name: mix-equal"),
        ({"name": 5, "base": "mix"}, "a variant needs a name"),
    ],
)
def test_variants_that_make_no_sense(variant: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        cells(variant)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_names_are_unique() -> None:
    with pytest.raises(UserError, match="two methods named 'x'"):
        cells({"name": "x", "base": "mix"}, {"name": "x", "base": "quant"})


def test_a_file_names_variants_among_methods(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("methods: [{name: mix-equal, base: mix, layer_budgets: equal}, quant]\n")
    config, _ = resolve({}, str(file))
    variant, other = config.methods
    assert variant == Variant(name="mix-equal", base="mix", layer_budgets="equal")
    assert other == "quant"
    assert config.to_json()["methods"] == [{"name": "mix-equal", "base": "mix", "layer_budgets": "equal"}, "quant"]
    assert RunConfig(methods=config.to_json()["methods"]) == RunConfig(methods=config.methods)
    assert resolve({"methods": "mix"}, str(file))[0].methods == ("mix",)


def test_the_preset_of_variants_is_a_grid() -> None:
    config, _ = resolve({}, "tuning")
    found = grid(config.measured_methods, config.budgets, config.window_size, None, config.method_settings)
    assert len({cell.key for cell in found}) == len(found) == 1 + 2 * (len(load_preset("tuning")["methods"]) - 1)


def test_a_run_has_a_row_for_each(tiny_folder: Path, tmp_path: Path) -> None:
    config = RunConfig(
        model=(str(tiny_folder),),
        methods=[{"name": "mix-int4", "base": "mix", "quant_format": "int4"}, "mix"],
        cache_size=64,
        window_size=8,
        quant_format="int8",
        lengths=250,
        samples=2,
        device="cpu",
        dtype="float32",
    )
    outcome = execute(config, tmp_path / "run", Console(file=io.StringIO()))
    assert [(row.method, row.quant_format) for row in outcome.rows] == [
        ("full", None),
        ("mix-int4", "int4"),
        ("mix", "int8"),
    ]
    assert {sample["method"] for sample in read_lines(tmp_path / "run" / "samples.jsonl")} == {
        "full",
        "mix-int4",
        "mix",
    }
    assert execute(config, tmp_path / "run", Console(file=io.StringIO())).measured == 0


def test_variants_are_not_taken_for_methods_that_there_are_none_of() -> None:
    first_look(RunConfig(methods=("mix", {"name": "own", "base": "mix", "window_size": 16}), model=("smollm2-135m",)))
    with pytest.raises(UserError, match="unknown method 'mixx'"):
        first_look(RunConfig(methods=("mixx",), model=("smollm2-135m",)))
