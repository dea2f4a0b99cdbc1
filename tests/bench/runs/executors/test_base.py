"""Units answered in this process: the model that an executor holds, and what transformers is told when it loads one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.engine.engine import Failure, Measurement
from bench.errors import UserError
from bench.methods.grid import grid
from bench.models.inputs import identity
from bench.models.loading import describe
from bench.runs.executors import Setup, Unit, make_executor
from bench.runs.executors.base import Answerer
from bench.runs.executors.local import LocalExecutor
from bench.runs.executors.worker import Worker
from bench.settings.run import RunConfig
from tasks.base import Document, Generate

CELLS = tuple(grid(["full", "mix"], [{"cache_size": 32}], [8], ["int8"], {}))
IDS = tuple(range(5, 105))


def unit(model: str, new_tokens: int = 6) -> Unit:
    document = Document(id="a", request=Generate(prompt_ids=IDS, max_new_tokens=new_tokens))
    return Unit(model=model, task="toy", work=((document, CELLS),))


def setup(folder: Path, **settings: Any) -> Setup:
    config = RunConfig(model=(str(folder),), device="cpu", dtype="float32", **settings)
    model = describe(str(folder))
    return Setup.of(config, {model.name: model, "other": model}, CELLS)


def answers(answerer: Answerer, model: str = "tiny") -> list[Any]:
    found = [answered.result for answered in answerer.answer(unit(model))]
    assert all(isinstance(item, Measurement) for item in found)
    return [item.answer for item in found]


def test_one_model_at_a_time(tiny_folder: Path) -> None:
    answerer = Answerer(setup(tiny_folder))
    first = answerer.engine("tiny")
    assert answerer.engine("tiny") is first
    assert answerer.engine("other") is not first
    warm_up = "a prompt of 256 tokens through every cell, budgets of 128"
    assert answerer.loaded["other"] == {"dtype": "float32", "device": "cpu", "warm_up": warm_up}


def test_a_further_model_that_cannot_be_loaded_fails_alone(tiny_folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    both = dataclasses.replace(setup(tiny_folder), models={"tiny": str(tiny_folder), "damaged": str(damaged)})
    told: list[tuple[Unit, str]] = []
    with LocalExecutor(both) as executor:
        found = list(executor.run([unit("tiny"), unit("damaged"), unit("tiny")], lambda *said: told.append(said)))
    assert [isinstance(answered.result, Failure) for answered in found] == [False, False, True, True, False, False]
    assert "damaged cannot be loaded" in found[2].result.error  # type: ignore[union-attr]
    # Whoever waits hears which prompts are read, and how far each method is.
    begun = [
        "reading 1 prompt of up to 100 tokens",
        *(f"full: {n} token{'s' * (n > 1)} of 1 answer" for n in range(1, 6)),
    ]
    assert {unit.model for unit, _ in told} == {"tiny"}
    assert [doing for _, doing in told][:6] == begun
    first = dataclasses.replace(both, models={"damaged": str(damaged)})
    with pytest.raises(UserError, match="damaged cannot be loaded"), LocalExecutor(first):
        pass


def test_a_worker_stays_where_one_of_its_models_cannot_be_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_folder, tmp_path / "damaged")
    both = dataclasses.replace(setup(tiny_folder), models={"tiny": str(tiny_folder), "damaged": str(damaged)})
    worker = Worker(1)
    fingerprints = {name: identity(describe(reference)) for name, reference in both.models.items()}
    assert worker.prepare(both, fingerprints) is None
    (damaged / "model.safetensors").write_bytes(b"nothing")
    for _ in range(2):
        replies = [worker.answer(unit(name)) for name in ("damaged", "tiny")]
        kinds = [[type(result) for _, result in reply.results] for reply in replies]
        assert kinds == [[Failure, Failure], [Measurement, Measurement]]


def test_why_documents_do_not_go_side_by_side_is_in_the_record(tiny_folder: Path, tmp_path: Path) -> None:
    spread = shutil.copytree(tiny_folder, tmp_path / "spread")
    config = json.loads((spread / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config.pop("rope_scaling", None)
    (spread / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    for batch_size, why in (("2", "the model's rotary factors depend on the length of a text"), ("1", None)):
        answerer = Answerer(setup(spread, batch_size=batch_size))
        answerer.engine("spread")
        assert answerer.loaded["spread"].get("one_by_one") == why


def test_layers_that_lie_elsewhere_give_the_same_answers(tiny_folder: Path, tmp_path: Path) -> None:
    """One layer comes from the disk whenever it is needed, through the hooks that a device map puts on a model."""
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    spread = Answerer(setup(tiny_folder, model_kwargs=f"{{device_map: {places}, offload_folder: {tmp_path}}}"))
    assert answers(spread) == answers(Answerer(setup(tiny_folder)))
    assert spread.engine("tiny").model.hf_device_map["model.layers.1"] == "disk"
    assert answers(Answerer(setup(tiny_folder, device_map="auto"))) == answers(spread)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_kwargs": "low_cpu"}, "'low_cpu' is not of the form key=value"),
        ({"model_kwargs": "{a: ["}, "--model-kwargs:"),
        ({"model_kwargs": "dtype=float16"}, "model_kwargs cannot set dtype"),
        ({"model_kwargs": "device_map=auto", "device_map": "auto"}, "device_map is given by --device-map already"),
        ({"device_map": "sideways"}, "sideways"),
    ],
)
def test_what_transformers_cannot_be_told(tiny_folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Answerer(setup(tiny_folder, **settings)).engine("tiny")


def test_values_of_model_kwargs() -> None:
    config = RunConfig(model_kwargs="use_cache=true, revision_of=1.5,name=abc", device_map="auto")
    assert config.loading_kwargs == {"device_map": "auto", "use_cache": True, "revision_of": 1.5, "name": "abc"}
    nested = RunConfig(model_kwargs="{max_memory: {0: 70GiB}, n: 1}")
    assert nested.loading_kwargs == {"max_memory": {0: "70GiB"}, "n": 1}


def test_without_ray_the_extra_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    model = describe(str(tiny_folder))
    config = RunConfig(executor="ray")
    with pytest.raises(UserError, match=r"--executor=ray needs Ray: make env in .* '\.\[ray\]'"):
        make_executor(config, {model.name: model}, CELLS, None)  # type: ignore[arg-type]
    local = config.changed(executor="local")
    assert make_executor(local, {model.name: model}, CELLS, None).status() == ""  # type: ignore[arg-type]
