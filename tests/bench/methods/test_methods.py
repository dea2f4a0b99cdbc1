"""The grid: every combination that is a cache of its own, once."""

from __future__ import annotations

import pickle

import pytest

from arkv import METHODS, CacheConfig, ConfigError
from bench.errors import UserError
from bench.extend import Method
from bench.methods.cell import Cell
from bench.methods.grid import OwnMethod, full_cell, grid
from bench.methods.prompt import Asked
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
    assert counts == {"full": 1, "window": 2, "origin": 2, "quant": 4, "mix": 4, "mix-replay": 4}
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
    assert [cell.cache_config.original_share for cell in cells if cell.cache_config] == [1.0, 0.0, 0.5]
    assert {cell.cache_config.pool_width for cell in cells if cell.cache_config} == {3}


class Own(Method):
    name = "own"
    compress = print  # type: ignore[assignment]


class Sized(Own):
    has_budget = False


@pytest.mark.parametrize(
    ("cell", "key", "label"),
    [
        (full_cell(), "full", "full"),
        *zip(
            grid(["window", "origin", "quant", "mix"], [{"cache_size": 512}], [32], ["int8"], {}),
            [
                *("window-C512t-W32-65a2773a", "origin-C512t-W32-259dc4fc"),
                *("quant-C512t-W32-int8-807bd927", "mix-C512t-W32-int8-9bf12321"),
            ],
            [
                *("window C=512 tokens per layer", "origin C=512 tokens per layer"),
                *("quant C=512 tokens per layer int8", "mix C=512 tokens per layer int8"),
            ],
            strict=True,
        ),
        (
            grid(["mix"], [{"cache_ratio": 0.25}], [], None, {"budget_unit": "bytes"})[0],
            *("mix-R0.25b-W32-k4v3-b7066469", "mix 25 % of each prompt's bytes k4v3"),
        ),
        (
            grid(["quant"], [{"cache_size": 1024}], [16], ["fp8"], {"budget_unit": "bytes"})[0],
            *("quant-C1024b-W16-fp8-c1c55715", "quant C=1024 tokens' worth of bytes per layer fp8"),
        ),
        (
            grid(["mix"], [{"cache_size": 64}], [8], ["int4"], {"tau1": 3.0})[0],
            *("mix-C64t-W8-int4-ff6f41c5", "mix C=64 tokens per layer int4"),
        ),
        (Cell("hf:quanto-int4", Own(), Asked(), "0.2.7"), "hf:quanto-int4-23a47a8f", "hf:quanto-int4"),
        (
            Cell("kvpress:snapkv", Own(), Asked("tokens", 64), "0.5.5"),
            *("kvpress:snapkv-C64t-e5dce100", "kvpress:snapkv C=64 tokens per layer"),
        ),
        (
            Cell("kvpress:snapkv", Own(), Asked("bytes", None, 0.25), "0.5.5"),
            *("kvpress:snapkv-R0.25b-adfc27af", "kvpress:snapkv 25 % of each prompt's bytes"),
        ),
        (
            Cell("kvpress:chunkkv+tova", Own(), Asked("tokens", 64), "0.5.5"),
            *("kvpress:chunkkv+tova-C64t-79494b67", "kvpress:chunkkv+tova C=64 tokens per layer"),
        ),
        (
            grid(["own"], [{"cache_ratio": 0.5}], [], None, {}, {"own": OwnMethod(Own(), "0123456789ab")})[0],
            *("own-R0.5t-63b031d8", "own 50 % of each prompt's tokens"),
        ),
        (
            grid(["own"], [{"cache_ratio": 0.5}], [], None, {}, {"own": OwnMethod(Sized(), "0123456789ab")})[0],
            *("own-f69ebaac", "own"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value else "",
)
def test_keys_and_labels_of_finished_runs_stay(cell: Cell, key: str, label: str) -> None:
    """As they are written in run folders, by which a run is continued and compared."""
    assert (cell.key, cell.label) == (key, label)
    again = pickle.loads(pickle.dumps(cell))
    assert again == cell
    assert hash(again) == hash(cell)
    assert again.key == key
