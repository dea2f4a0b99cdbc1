"""Settings: published defaults, methods by name, and errors that help."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from transformers import LlamaConfig, MambaConfig

from arkv import METHODS, CacheConfig, ConfigError, PrefillCache, TriStateCache
from tests.arkv.conftest import Driver


def test_defaults_are_the_published_ones() -> None:
    config = CacheConfig(cache_size=512)
    assert config.window_size == 32
    assert (config.tau1, config.tau2, config.tau3) == (7.774380648611771, 5.407015096778621, 5.527702582901318)
    assert config.gamma == 263.8108280337562
    assert config.pool_width == 5
    assert config.quant_format == "fp8"
    assert config.original_share is None
    assert config.n_sink == 0
    assert config.decode_importance == "latest"
    assert config.importance == "mean_var"
    assert config.value_norm is False
    assert config.budget_unit == "tokens"
    assert config.cache_ratio is None


def test_each_method_is_a_handful_of_settings() -> None:
    assert set(METHODS) == {"window", "origin", "quant", "mix", "mix-replay"}
    window, origin, quant, mix = (
        CacheConfig.for_method(name, cache_size=64) for name in ("window", "origin", "quant", "mix")
    )
    assert (window.ranking, window.original_share, window.n_sink > 0) == ("recency", 1.0, True)
    assert (origin.ranking, origin.original_share, origin.n_sink) == ("heavy_hitter", 1.0, 0)
    assert (quant.ranking, quant.original_share) == ("heavy_hitter", 0.0)
    assert (mix.ranking, mix.original_share) == ("heavy_hitter", None)
    assert [item.quantizes for item in (window, origin, quant, mix)] == [False, False, True, True]
    assert [item.uses_oq for item in (window, origin, quant, mix)] == [False, False, False, True]
    assert CacheConfig.for_method("mix-replay", cache_size=64) == dataclasses.replace(mix, importance="replay")


def test_each_method_has_settings_of_its_own_in_byte_units() -> None:
    for name in METHODS:
        config = CacheConfig.for_method(name, cache_size=512, budget_unit="bytes")
        assert config.budget_unit == "bytes"
        assert config.original_share is not None
        assert config.quantizes == (name in ("quant", "mix", "mix-replay"))
        assert config.uses_oq == (name == "mix")
        assert (config.ranking == "recency") == (name == "window")
        assert (config.head_budgets == "all") == (config.importance == "replay") == (name == "mix-replay")
    assert CacheConfig.for_method("mix", cache_size=512, budget_unit="bytes", quant_format="fp8").quant_format == "fp8"


def test_a_share_of_the_prompt_is_whole_tokens() -> None:
    assert CacheConfig(cache_ratio=0.25).tokens_worth(1000) == 250
    assert CacheConfig(cache_ratio=0.25).tokens_worth(999) == 249
    assert CacheConfig(cache_ratio=1.0).tokens_worth(7) == 7
    # 0.29 * 100 is 28.999999999999996 in binary.
    assert CacheConfig(cache_ratio=0.29).tokens_worth(100) == 29
    assert CacheConfig(cache_size=512).tokens_worth(100) == 512


def test_settings_given_by_hand_win_over_the_method() -> None:
    config = CacheConfig.for_method("window", cache_size=64, n_sink=0, window_size=8, quant_format="int8")
    assert (config.n_sink, config.window_size, config.quant_format, config.ranking) == (0, 8, "int8", "recency")


def test_a_config_is_frozen_hashable_and_checked_again_when_replaced() -> None:
    config = CacheConfig(cache_size=64, window_size=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cache_size = 128  # type: ignore[misc]
    assert {config: 1}[CacheConfig(cache_size=64, window_size=8)] == 1
    with pytest.raises(ConfigError, match="window_size"):
        dataclasses.replace(config, window_size=64)


# Settings that make no sense, the name and value that the message must show, and settings that it suggests.
BAD: list[tuple[dict[str, Any], str, str, dict[str, Any]]] = [
    ({"cache_size": 1, "window_size": 1}, "cache_size", "1", {"cache_size": 512}),
    ({"cache_size": 0}, "cache_size", "0", {"cache_size": 512}),
    ({"cache_size": -5}, "cache_size", "-5", {"cache_size": 512}),
    ({"cache_size": 512.0}, "cache_size", "512.0", {"cache_size": 512}),
    ({"cache_size": "512"}, "cache_size", "'512'", {"cache_size": 512}),
    ({"cache_size": None}, "cache_size", "None", {"cache_size": 512}),
    ({"window_size": 0}, "window_size", "0", {"window_size": 32}),
    ({"window_size": -1}, "window_size", "-1", {"window_size": 32}),
    ({"window_size": 8.5}, "window_size", "8.5", {"window_size": 32}),
    ({"window_size": 64}, "window_size", "64", {"window_size": 63}),
    ({"window_size": 100}, "window_size", "100", {"cache_size": 101, "window_size": 100}),
    ({"n_sink": -1}, "n_sink", "-1", {"n_sink": 4}),
    ({"n_sink": 33}, "n_sink", "33", {"n_sink": 32}),
    ({"ranking": "age"}, "ranking", "'age'", {"ranking": "recency"}),
    ({"original_share": -0.1}, "original_share", "-0.1", {"original_share": 0}),
    ({"original_share": 1.01}, "original_share", "1.01", {"original_share": 1}),
    ({"original_share": math.nan}, "original_share", "nan", {"original_share": None}),
    ({"quant_format": "fp4"}, "quant_format", "'fp4'", {"quant_format": "fp8"}),
    ({"quant_format": "INT8"}, "quant_format", "'INT8'", {"quant_format": "int8"}),
    ({"tau1": 0.0}, "tau1", "0.0", {"tau1": 5.0}),
    ({"tau2": -1.0}, "tau2", "-1.0", {"tau2": 5.0}),
    ({"tau3": math.nan}, "tau3", "nan", {"tau3": 5.0}),
    ({"gamma": -1.0}, "gamma", "-1.0", {"gamma": 200.0}),
    ({"gamma": math.nan}, "gamma", "nan", {"gamma": 200.0}),
    ({"pool_width": 4}, "pool_width", "4", {"pool_width": 5}),
    ({"pool_width": 0}, "pool_width", "0", {"pool_width": 5}),
    ({"pool_width": -3}, "pool_width", "-3", {"pool_width": 5}),
    ({"decode_importance": "max"}, "decode_importance", "'max'", {"decode_importance": "mean"}),
    ({"cache_ratio": 0.5}, "cache_ratio", "0.5", {"cache_size": 512}),
    ({"cache_size": None, "cache_ratio": 0.0}, "cache_ratio", "0.0", {"cache_size": None, "cache_ratio": 0.25}),
    ({"cache_size": None, "cache_ratio": 1.5}, "cache_ratio", "1.5", {"cache_size": None, "cache_ratio": 0.25}),
    ({"cache_size": None, "cache_ratio": math.nan}, "cache_ratio", "nan", {"cache_size": None, "cache_ratio": 0.25}),
    ({"budget_unit": "byte"}, "budget_unit", "'byte'", {"budget_unit": "bytes", "original_share": 0.05}),
    ({"budget_unit": "bytes"}, "original_share", "None", {"budget_unit": "bytes", "original_share": 0.05}),
    ({"layer_budgets": "equals"}, "layer_budgets", "'equals'", {"layer_budgets": "equal"}),
    ({"importance": "mean_vax"}, "importance", "'mean_vax'", {"importance": "mean_var"}),
    ({"query_span": 0}, "query_span", "0", {"query_span": 4}),
    ({"span_weight": -0.1}, "span_weight", "-0.1", {"span_weight": 0.3}),
    ({"query_stride": 0}, "query_stride", "0", {"query_stride": 4}),
    ({"max_pool_width": 2}, "max_pool_width", "2", {"max_pool_width": 5}),
    ({"decode_rate": 0.0}, "decode_rate", "0.0", {"decode_rate": 0.03}),
    ({"decode_rate": 1.5}, "decode_rate", "1.5", {"decode_rate": 0.03}),
    ({"attention": "flash"}, "attention", "'flash'", {"attention": "fused"}),
    ({"attention": "torch"}, "attention", "'torch'", {"attention": "reconstruct"}),
]


@pytest.mark.parametrize("settings, name, value, suggestion", BAD, ids=[f"{b[1]}={b[2]}" for b in BAD])
def test_a_bad_value_is_named_with_a_value_that_works(
    settings: dict[str, Any], name: str, value: str, suggestion: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as error:
        CacheConfig(**{"cache_size": 64, **settings})
    message = str(error.value)
    assert f"{name}={value}" in message
    assert any(str(item) in message for item in suggestion.values()), message
    CacheConfig(**{"cache_size": 64, **suggestion})


# What a YAML file, a command line or a search over settings can hand over by mistake.
WRONG_TYPES: list[dict[str, Any]] = [
    {"window_size": True},
    {"n_sink": 1.5},
    {"n_sink": "4"},
    {"n_sink": None},
    {"original_share": "half"},
    {"original_share": "0.5"},
    {"quant_format": 8},
    {"quant_format": None},
    {"quant_format": ["fp8"]},
    {"tau1": "5"},
    {"tau2": None},
    {"tau3": math.inf},
    {"gamma": "200"},
    {"gamma": math.inf},
    {"pool_width": 5.0},
    {"pool_width": "5"},
    {"cache_size": None, "cache_ratio": "0.5"},
    {"cache_size": None, "cache_ratio": True},
    {"decode_rate": "0.1"},
    {"max_pool_width": 7.0},
    {"query_span": 128.0},
    {"value_norm": "yes"},
    {"ranking": None},
    {"ranking": ["recency"]},
]


@pytest.mark.parametrize("settings", WRONG_TYPES, ids=[str(item) for item in WRONG_TYPES])
def test_a_value_of_the_wrong_type_is_named_too(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(settings)[-1]):
        CacheConfig(**{"cache_size": 64, **settings})


@pytest.mark.parametrize(
    "wrong, near", [("mixx", "mix"), ("original", "origin"), ("Quant", "quant"), ("windo", "window")]
)
def test_an_unknown_method_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong}.*did you mean '{near}'"):
        CacheConfig.for_method(wrong, cache_size=64)


def test_a_method_like_no_other_lists_all() -> None:
    with pytest.raises(ConfigError) as error:
        CacheConfig.for_method("zzz", cache_size=64)
    assert all(name in str(error.value) for name in METHODS)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"cachesize.*did you mean 'cache_size'"):
        CacheConfig.for_method("mix", cachesize=64)


def test_a_method_without_a_cache_size_says_so() -> None:
    with pytest.raises((ConfigError, TypeError), match="cache_size"):
        CacheConfig.for_method("mix")


@pytest.mark.parametrize("cache", [TriStateCache, PrefillCache])
def test_a_model_without_attention_is_refused_by_name(cache: Any) -> None:
    argument = (CacheConfig(cache_size=64),) if cache is TriStateCache else ()
    mamba = MambaConfig(num_hidden_layers=2, hidden_size=32)
    with pytest.raises(ConfigError, match="mamba"):
        cache(mamba, *argument)


@pytest.mark.parametrize(("quant_format", "head_dim"), [("int2", 82), ("k4v3", 84)])
def test_a_head_dim_that_a_format_cannot_store_is_refused_with_a_format_that_can(
    quant_format: str, head_dim: int
) -> None:
    """By the first forward, which knows how wide keys and values are; in both units."""

    def read(**settings: Any) -> None:
        config = CacheConfig(**{"cache_size": 64, "original_share": 0.5, "quant_format": quant_format, **settings})
        driver = Driver(config, dim=head_dim)
        driver.feed(*driver.random(70, seed=1))
        driver.feed(*driver.random(1, seed=2))

    for unit in ("tokens", "bytes"):
        with pytest.raises(ConfigError) as error:
            read(budget_unit=unit)
        again = Driver(
            CacheConfig(cache_size=64, original_share=0.5, quant_format=quant_format, budget_unit=unit), dim=head_dim
        )
        for _ in range(2):
            # The refused forward leaves nothing behind.
            with pytest.raises(ConfigError, match=str(head_dim)):
                again.feed(*again.random(70, seed=1))
            assert again.cache.get_seq_length() == 0
        message = str(error.value)
        assert f"quant_format={quant_format!r}" in message
        assert str(head_dim) in message
        works = [name for name in ("int8", "fp8") if name in message]
        assert works, message
        read(budget_unit=unit, quant_format=works[0])
        # A method that quantizes nothing does not care.
        read(budget_unit=unit, original_share=1.0)


def test_a_cache_takes_a_model_config_alone() -> None:
    assert len(TriStateCache(LlamaConfig(num_hidden_layers=5), CacheConfig(cache_size=64))) == 5
