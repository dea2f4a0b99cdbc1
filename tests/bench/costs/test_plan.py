"""What a plan promises, held against what runs and models really take."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from arkv import PrefillCache, TriStateCache, attach, storage_bytes
from bench.cli import main
from bench.costs.plan import Load, calibrate, fit, model_size, parse_bytes
from bench.engine.engine import Engine
from bench.errors import UserError
from bench.methods.grid import full_cell, grid
from bench.models.loading import describe
from bench.settings.run import RunConfig
from tasks.base import Continuation, Document, Generate, LogLikelihood


def test_sizes_are_those_of_the_loaded_model(tiny: Any, tiny_folder: Path) -> None:
    size = model_size(describe(str(tiny_folder), weights=False), "float32")
    assert size.parameters == sum(parameter.numel() for parameter in tiny.model.parameters())
    assert size.weights_bytes == 4 * size.parameters
    assert (size.layers, size.kv_heads, size.head_dim, size.sliding_layers) == (2, 2, 16, 0)


@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_bytes_of_a_cache_are_at_most_those_planned(tiny: Any, tiny_folder: Path, unit: str) -> None:
    import torch

    size = model_size(describe(str(tiny_folder)), "float32")
    ids = torch.arange(5, 205)[None]
    cells = grid(
        ["full", "window", "origin", "quant", "mix"], [{"cache_size": 80}], [8], ["int8"], {"budget_unit": unit}
    )
    prefill = PrefillCache(tiny.model)
    with attach(tiny.model), torch.inference_mode():
        tiny.model(ids, past_key_values=prefill)
        for cell in cells:
            cache: Any = (
                prefill if cell.cache_config is None else TriStateCache.from_prefill(prefill, cell.cache_config)
            )
            held = prefill.nbytes() if cell.cache_config is None else storage_bytes(cache)
            planned = size.kv_bytes(cell, 200)
            assert planned is not None
            # Pools are whole groups of slots.
            assert 0.75 * planned <= held <= 1.1 * planned, cell.label
    assert size.kv_bytes(full_cell(), 200) == prefill.nbytes()


def test_a_folder_without_weights_can_be_planned(tiny_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    assert model_size(describe(str(bare), weights=False), "auto").parameters
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        describe(str(bare))


def test_contexts_are_counted_once() -> None:
    continuations = [Continuation(context_ids=(1,) * 9, token_ids=(place,)) for place in range(4)]
    continuations.append(Continuation(context_ids=(2,) * 5, token_ids=(1, 2)))
    documents = [
        Document(id="a", request=LogLikelihood(continuations=tuple(continuations))),
        Document(id="b", request=Generate(prompt_ids=(1,) * 20, max_new_tokens=7)),
    ]
    load = Load.of("toy", documents)
    assert (load.documents, load.prefills, sorted(load.context_lengths)) == (2, 3, [5, 9, 20])
    assert (load.longest, load.steps, load.block_tokens) == (27, 2 + 7, 6)


def test_what_does_not_fit(tiny_folder: Path) -> None:
    size = model_size(describe(str(tiny_folder)), "float32")
    load = Load.of("toy", [Document(id="a", request=Generate(prompt_ids=(1,) * 400, max_new_tokens=7))])
    needs = fit(size, [load], RunConfig(), 10**9)
    assert needs.fits
    assert needs.needed > size.weights_bytes + 2 * size.full_bytes(407)
    assert not fit(size, [load], RunConfig(), needs.needed).fits, "a tenth stays free"
    assert fit(size, [load], RunConfig(prefill_chunk=10), 10**9).needed < needs.needed
    assert fit(size, [load], RunConfig(batch_size="4"), 10**9).caches == 4 * needs.caches


def test_the_estimate_grows_with_the_work(tiny: Any) -> None:
    cells = grid(["full", "mix"], [{"cache_size": 32}], [8], ["int8"], {})
    timed = calibrate(Engine(tiny.model, tiny.tokenizer, cells), "tiny", 1000, 300)
    assert min(timed.linear_s + timed.square_s, *timed.step_s.values()) > 0
    request = Generate(prompt_ids=(1,) * 100, max_new_tokens=10)
    one, two = (Load.of("toy", [Document(id=str(i), request=request) for i in range(n)]) for n in (1, 2))
    assert timed.seconds(two, cells, 1000) == pytest.approx(2 * timed.seconds(one, cells, 1000))
    assert timed.seconds(one, cells, 5000) == pytest.approx(5 * timed.seconds(one, cells, 1000))
    assert timed.seconds(one, cells[:1], 1000) < timed.seconds(one, cells, 1000)


@pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed")
def test_presses_are_planned_with_one_prefill_more(tiny: Any) -> None:
    cells = grid(
        ["full", "kvpress:knorm", "kvpress:snapkv"], [{"cache_ratio": 0.5}, {"cache_ratio": 0.2}], [], None, {}
    )
    timed = calibrate(Engine(tiny.model, tiny.tokenizer, cells), "tiny", 1000, 300)
    load = Load.of("toy", [Document(id="a", request=Generate(prompt_ids=(1,) * 100, max_new_tokens=10))])
    prefill = 100 * timed.linear_s + 100**2 * timed.square_s
    own = [timed.compress_s[cell.key] * 100 + timed.step_s[cell.key] * load.steps for cell in cells]
    assert timed.seconds(load, cells, 1000) == pytest.approx(2 * prefill + sum(own))


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1000", 1000)])
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "5XB", "1.2.3GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="give a size such as 80GB"):
        parse_bytes(text, "--gpu-memory")


def test_the_command(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid_of = ["--model", str(tiny_folder), "--lengths", "250", "--samples", "3", "--quant-type", "full,mix"]
    cluster = ["--gpus", "8", "--gpu-memory", "1GB", "--gpus-per-worker", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main(["plan", *grid_of, "--cache-size", "64", *cluster, "--calibration-model", str(tiny_folder)])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "In all: 3 documents, 3 prefills, 4 workers." in said
    assert "tiny fits: " in said
    assert "needle (question after): 3 documents give no interval and no verdict" in said
    assert "How: prompts of 256 and 1,024 tokens" in said
    for arguments, line in (
        (["--gpu-memory", "lots"], "--gpu-memory=lots"),
        (["--gpus", "1", "--gpus-per-worker", "2"], "--gpus-per-worker=2"),
        (["--speedup", "0"], "--speedup=0"),
        (["--tasks", "needel"], "did you mean needle"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["plan", *grid_of, "--no-calibrate", *arguments])
        assert caught.value.code == 2
        assert line in capsys.readouterr().err
