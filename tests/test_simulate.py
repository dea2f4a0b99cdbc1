"""scripts/simulate.py on a tiny model: what it says a cache holds is what the cache holds."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from arkv import CacheConfig, PrefillCache, TriStateCache, attach, replay
from bench.models.loading import load
from tests.bench.conftest import save_tiny_model
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("simulate", ROOT / "scripts" / "simulate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their module.
    sys.modules["simulate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["simulate"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_variant_is_the_cache_of_the_same_settings(script: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "NUMBER_BYTES", 4)
    loaded = load(str(tiny), dtype="float32", device="cpu")
    AttentionInterface.register("simulated", script.simulated_attention)
    draws = torch.Generator().manual_seed(3)
    ids, asked = (torch.randint(5, 300, (size,), generator=draws).tolist() for size in (300, 12))
    question = script.Question(asked[:8], asked[8:])
    context = script.Context(loaded, ids, [question])
    held, share = context.compressed(script.Variant(name="base", sure_share=0.0), 0.12, question)
    simulated = context.read(held, [question])[0]

    config = CacheConfig.for_method(
        "mix",
        budget_unit="bytes",
        cache_ratio=0.12,
        importance="replay",
        head_budgets="all",
        n_recent=4,
        original_share=0.0,
        sure_share=0.0,
        stream_norm=True,
    )
    prefill = PrefillCache(loaded.model, 128)
    with torch.no_grad(), attach(loaded.model):
        loaded.model(torch.tensor([ids]), past_key_values=prefill)
        replay(loaded.model, torch.tensor([ids]), prefill, config)
        cache = TriStateCache.from_prefill(prefill, config)
        tokens = sum(int(sum(layer.counts()).sum()) for layer in cache.own_layers)
        logits = loaded.model(torch.tensor([asked]), past_key_values=cache).logits[0, 7:-1]
    assert tokens / held[0].bias.numel() / len(held) == pytest.approx(share, rel=0.02)
    assert 0.12 < share < 0.6
    exact = torch.log_softmax(logits, dim=-1)
    assert (simulated - exact).abs().max() < 0.05 * (exact.amax() - exact.amin())


def test_every_variant_has_a_row_and_the_full_cache_diverges_by_nothing(
    script: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(tiny), dtype="float32", device="cpu")
    ids = torch.randint(5, 300, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    questions = [script.Question(ids[:6], ids[6:9]), script.Question(ids[20:24], ids[24:29])]
    monkeypatch.setattr(script, "contexts", lambda loaded, *args: iter([script.Context(loaded, ids, questions)]))
    monkeypatch.setattr(script, "load", lambda *args, **kw: loaded)
    monkeypatch.setattr(script, "VARIANTS", [*script.VARIANTS[:8], script.VARIANTS[-1]])
    script.main(["--contexts", "1", "--ratios", "0.3,0.12", "--outdir", str(tmp_path / "out")])
    with open(tmp_path / "out" / "simulated.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["full", *([variant.name for variant in script.VARIANTS] * 2)]
    assert {row["answers"] for row in rows} == {"2"}
    assert float(rows[0]["kl"]) == 0.0
    by_name = {(row["variant"], row["ratio"]): row for row in rows}
    assert float(by_name["nothing quantized", "0.12"]["held"]) < 0.12 < float(by_name["base", "0.12"]["held"])
    assert float(by_name["base", "0.3"]["kl"]) < float(by_name["base", "0.12"]["kl"])
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["settings"]["ratios"] == "0.3,0.12"
