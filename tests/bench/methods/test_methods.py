"""The grid: every combination that is a cache of its own, once."""

from __future__ import annotations

import pytest

from arkv import METHODS, CacheConfig, ConfigError
from bench.errors import UserError
from bench.methods.grid import grid
from bench.names import DESCRIPTIONS, FULL

C64 = {"cache_size": 64}
ALL = [FULL, *METHODS]


def test_every_method_is_described() -> None:
    assert list(DESCRIPTIONS) == ALL


def test_the_grid_holds_no_cache_twice() -> None:
    cells = grid(ALL, [{"cache_size": 64}, {"cache_size": 128}], [8], ["fp8", "int8"], {})
    assert [cell.method for cell in cells].count(FULL) == 1
    # window and origin quantize nothing: a format makes no difference to them.
    counts = {method: sum(cell.method == method for cell in cells) for method in ALL}
    assert counts == {"full": 1, "window": 2, "origin": 2, "quant": 4, "mix": 4}
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.method for cell in cells] == sorted((cell.method for cell in cells), key=ALL.index)


def test_what_a_table_says_of_a_cell() -> None:
    full, origin, mix = grid([FULL, "origin", "mix"], [C64], [8], ["int8"], {})
    assert (full.cache_size, full.window_size, full.quant_format, full.budget_unit) == (None, None, None, None)
    assert (origin.cache_size, origin.window_size, origin.quant_format, origin.budget_unit) == (64, 8, None, "tokens")
    assert mix.quant_format == "int8"
    assert (full.label, mix.label) == ("full", "mix C=64 tokens per layer int8")


def test_keys_are_stable_and_follow_the_settings() -> None:
    def key(**settings: object) -> str:
        return grid(["mix"], [C64], [8], ["int8"], settings)[0].key

    assert key() == key()
    assert key() != key(tau1=3.0)
    assert len({key(), key(budget_unit="bytes"), key(attention="reconstruct")}) == 3
    assert key().startswith("mix-C64t-W8-int8-")


def test_wrong_names_are_usage_errors() -> None:
    for arguments, said in (
        ((["mixx"], [C64], [8], ["int8"], {}), "unknown method 'mixx': did you mean mix"),
        ((["mix"], [C64], [8], ["int7"], {}), "unknown quant format 'int7': did you mean int"),
        ((["kvpress:snapkw"], [C64], [8], None, {}), "unknown method 'kvpress:snapkw': did you mean kvpress:snapkv"),
        ((["full"], [C64], [8], ["zzz"], {}), "unknown quant format 'zzz': known: "),
    ):
        with pytest.raises(UserError, match=said) as caught:
            grid(*arguments)
        assert caught.value.exit_code == 2


def test_a_window_as_large_as_the_cache() -> None:
    with pytest.raises(ConfigError, match="window_size=64 is not smaller than cache_size=64"):
        grid(["mix"], [C64], [64], ["int8"], {})


def test_a_share_of_each_prompt_and_byte_units() -> None:
    """Without a format each method takes its own."""
    own = CacheConfig.for_method("mix", cache_ratio=0.25, budget_unit="bytes").quant_format
    ratio = grid(["mix"], [{"cache_ratio": 0.25}], [8], None, {"budget_unit": "bytes"})[0]
    assert (ratio.cache_size, ratio.cache_ratio, ratio.budget_unit, ratio.quant_format) == (None, 0.25, "bytes", own)
    assert ratio.budget == "25 % of each prompt's bytes"


def test_settings_do_not_turn_a_method_into_another() -> None:
    cells = grid(["origin", "quant", "mix"], [C64], [8], None, {"original_share": 0.5, "pool_width": 3})
    assert [cell.config.original_share for cell in cells if cell.config] == [1.0, 0.0, 0.5]
    assert {cell.config.pool_width for cell in cells if cell.config} == {3}
