"""Settings: presets, what was typed, and which of them wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import UserError
from bench.settings.presets import load_preset, preset_description, preset_names, resolve
from bench.settings.run import RunConfig


def refused(**flags: object) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(flags, None)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


def test_lists_are_read_in_order_without_repetitions() -> None:
    config, origin = resolve({"cache_size": "1024, 512,1024", "quant_type": "mix,full", "limit": 3}, None)
    assert config.cache_size == (1024, 512)
    assert config.methods == ("mix", "full")
    assert (origin["cache_size"], origin["seed"]) == ("flag", "default")


def test_flags_win_over_a_preset_and_a_preset_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("description: mine\ncache-size: [64, 128]\nlimit: 5\nhaystack: text.txt\ntau1: 3\n")
    config, origin = resolve({"limit": 2, "seed": None}, str(file))
    assert (config.cache_size, config.limit, config.seed) == ((64, 128), 2, RunConfig().seed)
    assert config.haystack == Path("text.txt")
    assert config.method_settings["tau1"] == 3.0
    assert (origin["cache_size"], origin["limit"], origin["seed"]) == (f"preset {file}", "flag", "default")


def test_a_file_wins_over_the_preset_before_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("samples: 2\n")
    config, origin = resolve({"seed": 3}, f"demo,{file}")
    assert (config.samples, config.seed, config.budget_unit) == (2, 3, "bytes")
    assert (origin["samples"], origin["budget_unit"]) == (f"preset {file}", "preset demo")
    assert resolve({}, f"{file},demo")[0].samples != 2


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_says_what_it_is(name: str) -> None:
    config, _ = resolve({}, name)
    assert config.methods
    assert preset_description(name)


def test_the_demo_asks_long_prompts_of_all_five_methods() -> None:
    config, _ = resolve({}, "demo")
    assert min(config.lengths) >= 2000
    assert config.methods == ("full", "window", "origin", "quant", "mix")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("cache_sizes: 5", "unknown setting 'cache_sizes': did you mean cache_size"),
        ("- a\n- b", "setting: value"),
        ("", "setting: value"),
        ("a: [", "not valid YAML"),
        ("limit: many", "--limit: 'many' is not a whole number"),
        ("states: perhaps", "neither true nor false"),
        ("cache_size:", "a value is needed"),
    ],
)
def test_bad_presets(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        resolve({}, str(file))
    assert caught.value.exit_code == 2


def test_unknown_and_missing_presets() -> None:
    with pytest.raises(UserError, match="did you mean demo"):
        load_preset("demos")
    with pytest.raises(UserError, match="does not exist"):
        load_preset("nowhere.yaml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"cache_size": "512,many"}, "--cache-size: 'many' is not a whole number"),
        ({"cache_size": "-5"}, "--cache-size=-5: give 2 or more"),
        ({"cache_size": ","}, "at least one value"),
        ({"cache_ratio": "0.25,1.5"}, "--cache-ratio=1.5"),
        ({"budget_unit": "token"}, "--budget-unit=token: use tokens or bytes"),
        ({"window_size": "0"}, "--window-size=0"),
        ({"limit": 0}, "--limit=0"),
        ({"samples": -1}, "--samples=-1"),
        ({"lengths": "0"}, "--lengths=0"),
        ({"max_length": 1}, "--max-length=1"),
        ({"num_fewshot": -1}, "--num-fewshot=-1"),
        ({"sampling_ratio": 0.0}, "--sampling-ratio=0.0"),
        ({"sampling_ratio": 1.5}, "--sampling-ratio=1.5"),
        ({"sampling_ratio": float("nan")}, "--sampling-ratio=nan"),
    ],
)
def test_values_that_make_no_sense(flags: dict[str, object], said: str) -> None:
    assert said in str(refused(**flags))


def test_settings_are_json() -> None:
    config, _ = resolve({"data_dir": "data", "cache_size": "512,1024"}, "demo")
    settings = config.to_json()
    assert (settings["data_dir"], settings["cache_size"]) == ("data", [512, 1024])


def test_budgets_are_sizes_or_shares() -> None:
    assert resolve({"cache_size": "64,128"}, None)[0].budgets == [{"cache_size": 64}, {"cache_size": 128}]
    assert resolve({"cache_ratio": "0.5"}, None)[0].budgets == [{"cache_ratio": 0.5}]
