"""The search: what it may try, which documents it sees, that prompts are computed once, and that a study goes on."""

from __future__ import annotations

import csv
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import yaml

from arkv import CacheConfig
from bench.cli import main
from bench.engine.engine import Engine, Measurement
from bench.errors import UserError
from bench.methods.grid import tristate_cell
from bench.methods.plugins import Plugins
from bench.runs.asked import cells_of
from bench.search.config import TuneConfig
from bench.search.documents import load_splits, overlap
from bench.search.fidelity import FidelityBench
from bench.search.objective import KL, SCORE, Objective
from bench.search.output import write_preset
from bench.search.parameters import DEFAULTS, PARAMETERS, declared
from bench.search.study import Study, search
from bench.settings.presets import resolve
from bench.settings.run import METHOD_SETTINGS, RunConfig
from bench.settings.tune import TuneSettings
from tasks.base import Compare

pytest.importorskip("optuna")


TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:20_000]


def configured(folder: Path, run: dict[str, Any] | None = None, **settings: Any) -> TuneConfig:
    defaults: dict[str, Any] = {
        "model": (str(folder),),
        "tasks": ("fidelity",),
        "quant_type": ("mix",),
        "cache_size": (64,),
        "window_size": (8,),
        "quant_format": ("int8",),
        "lengths": (250,),
        "text": folder / "text.txt",
        "continuation": 8,
        "limit": 2,
        "device": "cpu",
        "dtype": "float32",
    }
    return TuneConfig(run=TuneSettings(**{**defaults, "n_trials": 3, "held_out": 5, **(run or {}), **settings}))


def commanded(folder: Path, outdir: Path, *more: str) -> list[str]:
    few = ["--cache-size", "64", "--window-size", "8", "--quant-format", "int8", "--lengths", "250"]
    few += [
        "--text",
        str(folder / "text.txt"),
        "--continuation",
        "8",
        "--limit",
        "2",
        "--held-out",
        "5",
        "--n-trials",
        "3",
    ]
    return [
        "tune",
        "--model",
        str(folder),
        *few,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--outdir",
        str(outdir),
        *more,
    ]


@pytest.fixture(scope="session", autouse=True)
def _text(tiny_folder: Path) -> None:
    """A text beside the model: all of Python's would take most of the time."""
    (tiny_folder / "text.txt").write_text(TEXT)


@pytest.fixture
def go(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str, str]]:
    """Run a command: exit code, and what it said on both streams."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    return run


# --- Settings ---


def test_every_parameter_is_a_setting_of_a_cache_and_of_a_run() -> None:
    assert set(PARAMETERS) == {*METHOD_SETTINGS, "window_size"}
    for name, parameter in PARAMETERS.items():
        default = getattr(CacheConfig.for_method("mix", cache_size=512), name)
        assert default is None or parameter.holds(default), name
        in_bytes = getattr(CacheConfig.for_method("mix", cache_size=512, budget_unit="bytes"), name)
        assert parameter.holds(in_bytes), name


def test_the_published_search(tmp_path: Path) -> None:
    assert DEFAULTS["tokens"] == ("tau1", "tau2", "tau3", "gamma")
    assert [(PARAMETERS[name].low, PARAMETERS[name].high) for name in DEFAULTS["tokens"]] == [(0.1, 10.0)] * 3 + [
        (0, 400)
    ]
    assert configured(tmp_path).searched == DEFAULTS["tokens"]
    assert configured(tmp_path, {"budget_unit": "bytes", "quant_format": None}).searched == DEFAULTS["bytes"]


@pytest.mark.parametrize(
    ("params", "found"),
    [
        (("importance",), {"importance": "mean_max"}),
        (("importance", "query_span"), {"importance": "mean_max", "query_span": int(PARAMETERS["query_span"].high)}),
        (("window_size",), {"window_size": int(PARAMETERS["window_size"].high)}),
    ],
    ids=str,
)
def test_prompts_are_recorded_with_the_queries_of_any_trial(
    tmp_path: Path, params: tuple[str, ...], found: dict[str, Any]
) -> None:
    """Also where the method's own importance needs fewer than the one that a trial chooses."""
    run = {"budget_unit": "bytes", "quant_format": None, "importance": "mean_var", "cache_size": (512,)}
    config = configured(tmp_path, run, params=params)
    needed = config.config(0, found).recorded_queries
    assert needed > config.base(0).recorded_queries
    assert needed <= config.recorded_queries


@pytest.mark.parametrize(
    ("run", "settings", "said"),
    [
        ({}, {"params": ("tau4",)}, "--params=tau4: did you mean tau"),
        ({}, {"params": ("original_share",)}, "OQ ratios say what stays Original"),
        ({}, {"params": ("max_pool_width",)}, "importance is mean_var"),
        ({"quant_type": ("origin",)}, {"params": ("tau1",)}, "the method has no OQ score"),
        ({"quant_type": ("window",)}, {"params": ("gamma",)}, "ranks tokens by age"),
        ({"budget_unit": "bytes"}, {"params": ("decode_rate",)}, "give a smaller --chunk"),
        ({"quant_type": ("window",)}, {}, "nothing can be searched"),
        ({"quant_type": ("mix", "quant")}, {}, "--methods=mix,quant: a search has one; give one of window"),
        ({"quant_type": ("full",)}, {}, "--methods=full: the full cache has no settings; give one of window"),
        ({"quant_type": ("kvpress:knorm",)}, {}, "settings of the tri-state cache, which methods of kvpress"),
        ({"quant_type": ("mxi",)}, {}, "no method with settings that can be searched: did you mean mix"),
        ({}, {"n_trials": 0}, "--n-trials=0"),
        ({}, {"held_out": 2}, "--held-out=2: give 5 or more"),
        ({}, {"chunk": 0}, "--chunk=0"),
        ({}, {"keep_gib": -1.0}, "--keep-gib=-1.0"),
    ],
)
def test_searches_that_make_no_sense(tmp_path: Path, run: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        configured(tmp_path, run, **settings)
    assert caught.value.exit_code == 2


def test_a_search_without_a_window_has_the_method_s_own(tmp_path: Path) -> None:
    config = configured(tmp_path, {"window_size": (), "cache_size": (512,)})
    assert config.base(0).window_size == 32
    assert config.config(0, {"window_size": 16}).window_size == 16
    write_preset(config, {}, "found", tmp_path)
    assert "window-size" not in yaml.safe_load((tmp_path / "preset.yaml").read_text())


def test_a_chunk_makes_decoding_count(tmp_path: Path) -> None:
    config = configured(tmp_path, {"budget_unit": "bytes"}, params=("decode_rate",), chunk=4)
    assert config.searched == ("decode_rate",)


# --- Methods of plugins ---

PLUGIN = """
import torch
from bench.extend import Method, keep_tokens

class Ends(Method):
    name = "ends"
    first = 2
    kind = "newest"
    settings_space = {"first": (0, 8, 2), "kind": ("newest", "none")}

    def with_settings(self, **values):
        if values.get("first", 0) % 2:
            raise ValueError("first is odd")
        return super().with_settings(**values)

    def compress(self, model, prompt, budget):
        n = prompt.tokens
        last = range(n - 1, n) if self.kind == "none" else range(n - budget.tokens + self.first, n)
        places = torch.tensor([*range(self.first), *last])
        return keep_tokens(prompt, [places.expand(layer.keys.shape[1], -1) for layer in prompt.layers])

class Plain(Ends):
    name = "plain"
    settings_space = {}
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "ends.py"
    file.write_text(PLUGIN)
    return file


def test_settings_of_a_plugin_are_searched_and_run(tiny_folder: Path, tmp_path: Path, plugin: Path, go: Any) -> None:
    outdir = tmp_path / "study"
    few = [
        "--methods",
        "ends",
        "--plugin",
        str(plugin),
        "--cache-size",
        "64",
        "--lengths",
        "250",
        "--continuation",
        "4",
    ]
    where = ["--text", str(tiny_folder / "text.txt"), "--device", "cpu", "--dtype", "float32", "--outdir", str(outdir)]
    documents = ["--limit", "1", "--held-out", "5", "--n-trials", "3", "--chunk", "1"]
    code, out, err = go(["tune", "--model", str(tiny_folder), *few, *where, *documents])
    assert code == 0, err
    assert "The best of 3 trials is" in out or "No trial was better than the method's own settings: kl" in out
    assert f"run --preset {outdir / 'preset.yaml'} --plugin {plugin}" in out
    with open(outdir / "trials.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["first"], first["kind"]) == ("2", "newest"), "the first trial has the method's own"
    chosen = json.loads((outdir / "tune.json").read_text())["chosen"]["params"]
    config, _ = resolve({}, str(outdir / "preset.yaml"))
    cells = cells_of(config, Plugins([plugin]))
    assert [cell.method for cell in cells] == ["full", "ends-tuned"]
    assert {name: getattr(cells[1].impl, name) for name in chosen} == chosen


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({"frist": 2}, "x: unknown setting 'frist' of ends: did you mean first"),
        ({"first": 3}, "ends: ValueError: first is odd"),
        ({"base": "plain", "first": 2}, "unknown setting 'first' of plain: the method declares no settings_space"),
        ({"base": "no"}, "variant 'x': its base 'no' is none of window, origin, quant, mix, mix-replay, ends, plain"),
    ],
)
def test_variants_of_a_plugin_that_make_no_sense(plugin: Path, variant: dict[str, Any], said: str) -> None:
    config = RunConfig(methods=[{"name": "x", "base": "ends", **variant}], cache_size=64)
    with pytest.raises(UserError, match=said):
        cells_of(config, Plugins([plugin]))


def test_variants_of_a_plugin_are_cells_of_their_own(plugin: Path) -> None:
    def keys(**values: Any) -> list[str]:
        methods = ["ends", {"name": "x", "base": "ends", **values}]
        return [cell.key for cell in cells_of(RunConfig(methods=methods, cache_size=64), Plugins([plugin]))]

    assert keys(first=4) == keys(first=4)
    assert keys(first=4)[1] == keys()[1]
    assert keys(first=4)[2] != keys(first=2)[2]


def test_a_plugin_without_a_space_cannot_be_tuned(plugin: Path) -> None:
    with pytest.raises(UserError, match="--methods=plain: it declares no settings_space"):
        TuneConfig(run=TuneSettings(methods=("plain",)), own=Plugins([plugin]).methods)
    with pytest.raises(UserError, match=r"m: settings_space\['a'\] is \(2, 1\): give \(low, high\)"):
        declared("m", {"a": (2, 1)})


# --- Documents ---


@pytest.fixture(scope="module")
def objective(tiny: Any, tiny_folder: Path) -> Objective:
    config = configured(tiny_folder)
    return Objective(config, tiny, load_splits(config, tiny))


def test_no_text_is_in_both_parts(objective: Objective) -> None:
    (split,) = objective.splits
    assert (len(split.tuning), len(split.held_out)) == (2, 5)
    places = [
        [(item.info["start"], item.info["start"] + 250 + 8) for item in part] for part in (split.tuning, split.held_out)
    ]
    assert not any(low < end and begin < high for low, high in places[0] for begin, end in places[1])
    assert overlap(split.tuning[0], split.tuning[0])


def test_a_text_without_room_for_both_parts(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The old farmer bought a basket of apples near the river. " * 24)
    with pytest.raises(UserError, match="too few to report on"):
        load_splits(configured(tiny_folder, {"text": text, "lengths": (200,)}), tiny)


# --- What a trial is worth ---


def test_divergences_are_those_of_a_run(tiny: Any, objective: Objective) -> None:
    """Read token by token, the search measures what ``run --tasks fidelity`` does."""
    document = objective.splits[0].tuning[0]
    assert isinstance(document.request, Compare)
    config = objective.config.base(0)
    cell = tristate_cell("mix", config)
    (answered,) = Engine(tiny.model, tiny.tokenizer, [cell]).answer(document, [cell])
    assert isinstance(answered, Measurement)
    expected = objective.splits[0].task.score(document, answered.answer)["kl"]
    found = FidelityBench(tiny.model, queries=8, chunk=1).divergences(document.request, [cell])
    assert found == [pytest.approx(expected, rel=1e-4)]
    # A budget that holds everything is the full cache.
    whole = CacheConfig.for_method("mix", cache_size=400, window_size=8)
    assert FidelityBench(tiny.model, queries=8).divergences(document.request, [tristate_cell("mix", whole)])[0] < 1e-6


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Lengths of what the model reads from now on."""
    lengths: Counter[int] = Counter()
    forward = type(model).forward

    @functools.wraps(forward)
    def counting(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        lengths[input_ids.shape[1]] += 1
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    return lengths


@pytest.mark.parametrize(("keep", "prefills"), [(1.0, 2), (0.0, 6)])
def test_prompts_are_computed_once_as_far_as_memory_goes(
    tiny: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: float, prefills: int
) -> None:
    config = configured(tiny_folder, keep_gib=keep)
    objective = Objective(config, tiny, load_splits(config, tiny))
    lengths = counted(tiny.model, monkeypatch)
    with Study(tmp_path / "study", {}, objective.directions, seed=0, fresh=False) as study:
        search(study, objective, lambda note: None)
        assert len(study.complete) == 3
    assert lengths[249] == prefills
    assert len(objective.fidelity.not_kept) == (0 if keep else 2)


def test_trials_of_a_batch_share_the_prompts_of_a_task(
    tiny: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny_folder, {"tasks": ("needle",)})
    objective = Objective(config, tiny, load_splits(config, tiny))
    assert objective.directions == {SCORE: "maximize"}
    lengths = counted(tiny.model, monkeypatch)
    values = objective.values([{"gamma": 0.0}, {"gamma": 400.0}, {"tau1": -1.0}])
    assert [isinstance(value, dict) for value in values] == [True, True, False]
    assert "tau1=-1.0" in str(values[2])
    assert sum(count for length, count in lengths.items() if length > 200) == 2


# --- Whole searches ---


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outdir = tmp_path_factory.mktemp("tune") / "study"
    with pytest.raises(SystemExit) as ended:
        main(commanded(tiny_folder, outdir))
    assert ended.value.code == 0
    return outdir


def test_what_a_search_leaves(done: Path) -> None:
    record = json.loads((done / "tune.json").read_text())
    with open(done / "trials.csv", newline="") as file:
        trials = list(csv.DictReader(file))
    assert [trial["trial"] for trial in trials] == ["0", "1", "2"]
    # The first trial has the published settings, so that none can be worse on the tuning documents.
    assert float(trials[0]["tau1"]) == CacheConfig(cache_size=64).tau1
    assert record["chosen"]["kl"] == min(float(trial["kl"]) for trial in trials)
    split = record["split"]["fidelity"]
    assert not set(split["tuning"]) & set(split["held_out"])
    with open(done / "heldout.csv", newline="") as file:
        held_out = list(csv.DictReader(file))
    assert [line["document"] for line in held_out] == split["held_out"]
    (verdict,) = record["held_out"]
    assert verdict["tuned"] == pytest.approx(sum(float(line["tuned"]) for line in held_out) / 5)
    assert verdict["difference"] == pytest.approx(verdict["tuned"] - verdict["own"])


def test_the_preset_is_one_of_run(done: Path) -> None:
    config, _ = resolve({}, str(done / "preset.yaml"))
    chosen = json.loads((done / "tune.json").read_text())["chosen"]["params"]
    assert {name: getattr(config, name) for name in DEFAULTS["tokens"]} == chosen
    assert (config.methods, config.cache_size, config.window_size) == (("full", "mix"), (64,), (8,))
    assert config.quant_format == ("int8",)


@pytest.mark.slow
def test_a_search_goes_on(done: Path, tiny_folder: Path, go: Any) -> None:
    before = (done / "trials.csv").read_text().splitlines()
    code, out, _ = go(commanded(tiny_folder, done, "--n-trials", "5"))
    assert code == 0
    assert "3 of 5 trials are in" in out
    after = (done / "trials.csv").read_text().splitlines()
    assert after[:4] == before
    assert len(after) == 6
    assert len({line.split(",")[2] for line in after[1:]}) == 5, "no trial is drawn twice"


@pytest.mark.parametrize(
    ("other", "named"),
    [(["--cache-size", "96"], "budgets"), (["--seed", "1"], "seed"), (["--params", "tau1"], "params")],
)
def test_a_study_of_other_settings_is_refused(
    done: Path, tiny_folder: Path, go: Any, other: list[str], named: str
) -> None:
    before = (done / "study.jsonl").read_bytes()
    code, _, err = go(commanded(tiny_folder, done, *other))
    assert code == 1
    assert "is a study of other settings" in err
    assert named in err
    assert (done / "study.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["nonsense", "nonsense\n", "5\n", "{}\n", '{"op_code": 99}\n', "\0\n{}\n"])
def test_what_is_no_study_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"is not a study of arkv-bench tune; .* or --fresh to replace it$"):
        opened(tmp_path).__enter__()
    assert (tmp_path / "study.jsonl").read_text() == content


def test_a_study_of_an_older_kind_is_refused_by_name(tiny_folder: Path, tmp_path: Path, go: Any) -> None:
    (tmp_path / "study.db").write_text("SQLite format 3")
    code, _, err = go(commanded(tiny_folder, tmp_path))
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"{tmp_path / 'study.db'} is a study of an older arkv-bench, which cannot be continued" in err
    assert "--fresh" in err
    with opened(tmp_path, fresh=True) as study:
        assert study.trials == []
    assert not (tmp_path / "study.db").exists()


def opened(folder: Path, *, fresh: bool = False) -> Study:
    return Study(folder, {"model": "tiny"}, {KL: "minimize"}, seed=0, fresh=fresh)


def test_a_study_whose_writer_was_killed_goes_on(tmp_path: Path) -> None:
    """It may have died within a line, between asking and telling, and with Optuna's own lock held."""
    with opened(tmp_path) as study:
        study.tell(study.ask(["tau1"]), {KL: 0.5}, 1.0)
        study.ask(["tau1"])
    file = tmp_path / "study.jsonl"
    whole = file.read_bytes()
    (tmp_path / "study.jsonl.lock").touch()
    for cut in (0, 1, len(whole.splitlines()[-1]), len(whole) - 1):
        file.write_bytes(whole[: len(whole) - cut])
        with opened(tmp_path) as study:
            complete = len(study.complete)
            assert complete == (1 if cut < len(whole) - 1 else 0)
            study.tell(study.ask(["tau1"]), {KL: 0.25}, 1.0)
        with opened(tmp_path) as study:
            assert [trial.values for trial in study.complete] == [[0.5]] * complete + [[0.25]]


@pytest.mark.slow
def test_ctrl_c_leaves_a_study_that_goes_on(
    tiny_folder: Path, tmp_path: Path, go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Objective.values, []

    def stopping(self: Objective, found: Any) -> Any:
        calls.append(found)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, found)

    monkeypatch.setattr(Objective, "values", stopping)
    outdir = tmp_path / "study"
    code, _, err = go(commanded(tiny_folder, outdir))
    assert code == 130
    assert f"stopped after 1 of 3 trials: the same command with --outdir {outdir} continues" in err
    code, out, _ = go(commanded(tiny_folder, outdir))
    assert code == 0
    assert "1 of 3 trials are in" in out
    assert len((outdir / "trials.csv").read_text().splitlines()) == 4


@pytest.mark.slow
def test_both_objectives_make_a_front(tiny_folder: Path, tmp_path: Path, go: Any) -> None:
    code, out, _ = go(commanded(tiny_folder, tmp_path / "study", "--tasks", "fidelity,needle"))
    assert code == 0
    assert "Pareto front" in out
    record = json.loads((tmp_path / "study" / "tune.json").read_text())
    assert record["directions"] == {KL: "minimize", SCORE: "maximize"}
    assert [verdict["task"] for verdict in record["held_out"]] == ["fidelity", "needle"]
