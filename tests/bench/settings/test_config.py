"""Settings: presets, what was typed, and which of them wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main

from bench.cli import app, main
from bench.errors import UserError
from bench.judge.power import documents_needed, too_few
from bench.settings.check import CheckConfig
from bench.settings.doctor import DoctorConfig
from bench.settings.fields import Settings, offered, setting_of, shape_of
from bench.settings.inspect import InspectConfig
from bench.settings.list_ import ListConfig
from bench.settings.plan import PlanConfig
from bench.settings.presets import (
    load_preset,
    preset_description,
    preset_names,
    preset_schema,
    read_preset,
    resolve,
)
from bench.settings.report import ReportConfig
from bench.settings.run import FIELDS, RunConfig
from bench.settings.score import ScoreConfig
from bench.settings.speed import SpeedConfig
from bench.settings.tune import TuneSettings
from bench.settings.view import ViewConfig
from tests.conftest import ROOT

GROUP: Any = typer.main.get_command(app)


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


def test_the_demo_asks_all_five_methods_after_compression() -> None:
    config, _ = resolve({}, "demo")
    assert min(config.lengths) >= 1000
    assert config.question == "after"
    assert config.methods == ("full", "window", "origin", "quant", "mix")


@pytest.mark.parametrize(("name", "more"), [("pareto", ("mix-replay",)), ("published", ())])
def test_presets_that_need_not_be_done_in_minutes_ask_long_prompts_of_all_methods(
    name: str, more: tuple[str, ...]
) -> None:
    config, _ = resolve({}, name)
    assert min(config.lengths) >= 2000
    assert config.methods == ("full", "window", "origin", "quant", "mix", *more)


@pytest.mark.parametrize("name", ["exam-small", "evidence-exam", "exam", "pareto"])
def test_exams_and_the_front_ask_the_method_that_reads_twice(name: str) -> None:
    assert "mix-replay" in resolve({}, name)[0].methods


@pytest.mark.parametrize("name", ["demo", "pareto", "published", "exam-small", "exam"])
def test_presets_ask_enough_to_tell_their_rows_apart(name: str) -> None:
    config, _ = resolve({}, name)
    rows = (len(config.methods) - 1) * len(config.cache_ratio or config.cache_size)
    needed = documents_needed(rows)
    assert needed is not None
    assert config.samples * len(config.lengths) >= needed
    assert too_few(config.samples, rows) == ""


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


# --- Values are of the type that they are declared with ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("samples: 2.9", "--samples: 2.9 is not a whole number; give one of 1 or more"),
        ("samples: 2.0", "--samples: 2.0 is not a whole number"),
        ("limit: true", "--limit: True is not a whole number"),
        ("seed: 1.5", "--seed: 1.5 is not a whole number"),
        ("cache-size: [512, 64.5]", "--cache-size: 64.5 is not a whole number"),
        ("cache-ratio: [true]", "--cache-ratio: True is not a number"),
        ("tau1: [3]", r"--tau1: \[3\] is not a number"),
        ("data_dir: 5", "--data-dir: 5 is not a path; in quotes it would be: '5'"),
        ("device: 5", "--device: 5 is not text; in quotes it would be: '5'"),
        ("device: true", "--device: True is not text; in quotes it would be: 'true'"),
        ("system_instruction: [a, b]", r"--system-instruction: \['a', 'b'\] is not text"),
        ("model: [a, 5]", "--model: 5 is not text"),
        ("tasks: 5", "--tasks: 5 is not text"),
        ("states: 1", "--states: 1 is neither true nor false"),
        ("skip-cut: 'yes'", "--skip-cut: 'yes' is neither true nor false"),
        ("budget-unit: 3", "--budget-unit=3: use tokens or bytes"),
        ("batch-size: 1.5", "--batch-size=1.5: give a whole number of 1 or more, or auto"),
        ("gen-kwargs: {a: 1}", "--gen-kwargs: {'a': 1} is not text"),
        ("model-kwargs: a", "--model-kwargs: 'a' is not of the form key=value"),
    ],
)
def test_presets_are_read_strictly(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        resolve({}, str(file))
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"preset {file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("samples: '3'", "samples", 3),
        ("tau1: 3", "tau1", 3.0),
        ("cache-ratio: 1", "cache_ratio", (1.0,)),
        ("device: '5'", "device", "5"),
        ("batch-size: 4", "batch_size", "4"),
        ("tasks: ['longbench:trec,lcc', needle]", "tasks", ("longbench:trec,lcc", "needle")),
        ("model-kwargs: {revision: abc, n: 1}", "loading_kwargs", {"revision": "abc", "n": 1}),
        ("quant-type: mix,full", "methods", ("mix", "full")),
        ("limit:", "limit", None),
    ],
)
def test_what_presets_may_say(tmp_path: Path, content: str, name: str, value: object) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(content)
    assert getattr(resolve({}, str(file))[0], name) == value


def test_a_setting_has_one_value(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("methods: full\nquant-type: mix\n")
    with pytest.raises(UserError, match="methods is given twice, once as quant-type"):
        resolve({}, str(file))
    with pytest.raises(UserError, match="the same setting"):
        RunConfig(methods="full", quant_type="mix")


@pytest.mark.parametrize("name", ["trust_remote_code", "confirm_run_unsafe_code", "include_path", "plugin"])
@pytest.mark.parametrize("value", ["true", "elsewhere"])
def test_what_runs_code_is_no_setting_of_a_file(tmp_path: Path, name: str, value: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"{name.replace('_', '-')}: {value}\n")
    with pytest.raises(UserError, match=rf"no setting '{name}': .*only --{name.replace('_', '-')} sets it"):
        resolve({}, str(file))
    flag = True if setting_kind(name) is bool else "elsewhere"
    assert getattr(resolve({name: flag}, None)[0], name)


def setting_kind(name: str) -> type:
    return shape_of(FIELDS[name].annotation).kind


SWITCHES = [name for name in FIELDS if setting_kind(name) is bool]


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_works_both_ways(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What nobody typed leaves the preset's value, and what was typed wins, whichever way."""

    def shown(*flags: str, preset: str) -> list[str]:
        (tmp_path / "p.yaml").write_text(preset)
        with pytest.raises(SystemExit) as ended:
            main(["run", "--preset", str(tmp_path / "p.yaml"), "--print-config", *flags])
        assert not ended.value.code
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name)
        return line.split()[1:3]

    option = name.replace("_", "-")
    assert shown(f"--{option}", preset="seed: 1") == ["True", "flag"]
    assert shown(f"--no-{option}", preset="seed: 1") == ["False", "flag"]
    if setting_of(FIELDS[name]).flag_only:
        return
    assert shown(preset=f"{option}: true") == ["True", "preset"]
    assert shown(preset=f"{option}: false") == ["False", "preset"]
    assert shown(f"--no-{option}", preset=f"{option}: true") == ["False", "flag"]
    assert shown(f"--{option}", preset=f"{option}: false") == ["True", "flag"]


# --- Everything comes from the fields ---


def example(name: str, tmp_path: Path) -> object:
    """A value that is not the default."""
    if name in ("haystack", "text"):
        (tmp_path / "text.txt").write_text("words")
        return tmp_path / "text.txt"
    shape, default = shape_of(FIELDS[name].annotation), FIELDS[name].default
    if name == "budget_unit":
        return "tokens"
    if name == "question":
        return "before"
    if name == "executor":
        return "ray"
    if name == "batch_size":
        return "3"
    if name == "model_kwargs":
        return "a=1"
    value = {int: 3, float: 0.25, str: "x", Path: tmp_path, bool: not default}[shape.kind]
    return (value,) if shape.many else value


@pytest.mark.parametrize("name", FIELDS)
def test_the_fingerprint_has_whatever_changes_an_answer(name: str, tmp_path: Path) -> None:
    plain = RunConfig(executor="ray") if setting_of(FIELDS[name]).panel == "Where it runs" else RunConfig()
    if name in ("top_p", "repeats"):
        # They say how answers are sampled, and none is without a temperature.
        plain = RunConfig(temperature=0.6)
    other = plain.changed(**{name: example(name, tmp_path)}) if name != "executor" else RunConfig(executor="ray")
    assert other != RunConfig()
    changed = other.fingerprint() != plain.fingerprint()
    assert changed == (setting_of(FIELDS[name]).affects == "answer")
    json.dumps(other.to_json())


FIRST_DEMO = {"tasks": "needle,fidelity", "question": "before", "samples": 5, "continuation": 12}
"""What the preset demo asked at first, and what its folders are known by."""
FIRST_FINGERPRINT = {
    "device": "auto",
    "dtype": "auto",
    "model_kwargs": None,
    "seed": 0,
    "max_length": None,
    "samples": 5,
    "num_fewshot": None,
    "apply_chat_template": False,
    "system_instruction": None,
    "enable_thinking": None,
    "gen_kwargs": None,
    "rolling_prefill": 0.5,
    "rolling_chunk": 32,
    "prefill_chunk": None,
    "haystack": None,
    "text": None,
    "continuation": 12,
    "plugins": {},
}


def test_folders_of_the_first_demo_have_the_same_fingerprint() -> None:
    mine = resolve(FIRST_DEMO, "demo")[0].fingerprint()
    assert {name: FIRST_FINGERPRINT.get(name) for name in mine} == mine


@pytest.mark.parametrize(("preset", "folder"), [("ci", "results/ci"), ("demo", "results/demo")])
def test_older_folders_have_the_same_fingerprint(preset: str, folder: str) -> None:
    """A setting that is new is in it only where it is not the default."""
    known = json.loads((ROOT / folder / "record.json").read_text())["fingerprint"]
    mine = resolve({}, preset)[0].fingerprint()
    assert {name: known.get(name) for name in mine} == mine


MODELS: dict[str, type[Settings]] = {
    "run": RunConfig,
    "plan": PlanConfig,
    "tune": TuneSettings,
    "speed": SpeedConfig,
    "inspect": InspectConfig,
    "report": ReportConfig,
    "check": CheckConfig,
    "score": ScoreConfig,
    "view": ViewConfig,
    "list": ListConfig,
    "doctor": DoctorConfig,
}


def test_every_command_has_a_model() -> None:
    assert MODELS.keys() == GROUP.commands.keys()


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_every_option_is_a_field(name: str, model: type[Settings]) -> None:
    command = GROUP.commands[name]
    own = {"run", "preset", "fresh", "print_config"} - model.model_fields.keys()
    assert [item.name for item in command.params if item.name not in own] == offered(model)
    for item in command.params:
        if item.name in own:
            continue
        field = model.model_fields[str(item.name)]
        if setting_of(field).argument:
            assert item.param_type_name == "argument"
        else:
            assert model.option(str(item.name)) in item.opts
        assert setting_of(field).help in str(item.help)
        assert item.default is None


def test_every_setting_of_a_run_is_an_option_of_run() -> None:
    assert set(offered(RunConfig)) == set(FIELDS)


@pytest.mark.parametrize("name", ["speed", "tune"])
def test_commands_that_are_told_no_budget_take_those_of_run(name: str) -> None:
    budgets = ("cache_size", "cache_ratio", "budget_unit", "quant_format")
    for given in ({}, {"cache_size": (512,)}, {"cache_ratio": (0.5,)}):
        mine, of_run = MODELS[name](**given), RunConfig(**given)
        assert [getattr(mine, field) for field in budgets] == [getattr(of_run, field) for field in budgets]
    (option,) = [item for item in GROUP.commands[name].params if item.name == "cache_ratio"]
    assert "0.25,0.125, unless --cache-size is given" in option.help


def test_presets_match_their_schema() -> None:
    schema = preset_schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for name in preset_names():
        validator.validate(read_preset(name))
    for wrong in (
        {"samples": 2.9},
        {"limit": True},
        {"device": 5},
        {"cache-sizes": 5},
        {"plugin": "x.py"},
        {"cache-ratio": [1.5]},
        {"budget-unit": "token"},
        {"methods": [{"base": "mix"}]},
    ):
        assert not validator.is_valid(wrong), wrong
    for right in ({"methods": "full,mix"}, {"limit": None}, {"cache_size": 64}, {"batch-size": 4}):
        assert validator.is_valid(right), right


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["list", "presets", "--schema"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == preset_schema()


# --- full ---


def test_full_is_measured_beside_whatever_is_asked_for() -> None:
    assert RunConfig(methods="mix").measured_methods == ("full", "mix")
    assert RunConfig(methods="mix,full").measured_methods == ("mix", "full")
    assert RunConfig(methods="mix", full=False).measured_methods == ("mix",)
    assert RunConfig(methods="full,mix", full=False).measured_methods == ("mix",)
    with pytest.raises(UserError, match="--no-full leaves no method"):
        _ = RunConfig(methods="full", full=False).measured_methods


@pytest.mark.parametrize(
    ("given", "budgets", "unit"),
    [
        ({}, [{"cache_ratio": 0.25}, {"cache_ratio": 0.125}], "bytes"),
        ({"cache_ratio": "0.5"}, [{"cache_ratio": 0.5}], "bytes"),
        ({"cache_size": "64,128"}, [{"cache_size": 64}, {"cache_size": 128}], "tokens"),
        ({"cache_size": "64", "budget_unit": "bytes"}, [{"cache_size": 64}], "bytes"),
        ({"cache_size": "64", "cache_ratio": "0.5"}, [{"cache_ratio": 0.5}], "bytes"),
        ({"budget_unit": "tokens"}, [{"cache_ratio": 0.25}, {"cache_ratio": 0.125}], "tokens"),
    ],
)
def test_shares_of_the_bytes_unless_a_number_of_tokens_is_given(
    given: dict[str, str], budgets: list[dict[str, float]], unit: str
) -> None:
    config = RunConfig(**given)
    assert (config.budgets, config.budget_unit) == (budgets, unit)
    again = config.changed(seed=3)
    assert (again.budgets, again.budget_unit) == (budgets, unit)
