"""What memory buys, held against caches of a real model's shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from arkv import PrefillCache, TriStateCache, storage_bytes
from bench.cli import main
from bench.costs.capacity import capacity, free_bytes, memory_of, prefill_bytes, scores_kept
from bench.costs.gpus import GPUS
from bench.costs.plan import config_size
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.methods.grid import full_cell, grid
from bench.records.row import Row

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
"""Of Llama-3.1-8B."""
PARAMETERS = 8_030_261_248
TOKENS = 1024


@pytest.fixture(scope="module")
def prefill() -> PrefillCache:
    """Keys and values of that shape that nobody computed."""
    config = LlamaConfig(**LLAMA)
    made, draw = PrefillCache(config, 128), torch.Generator().manual_seed(0)
    for layer in made.layers:
        shape = (1, 8, TOKENS, 128)
        layer.update(*(torch.randn(shape, generator=draw).bfloat16() for _ in range(2)))
        layer.queries = torch.randn(1, 32, 128, 128, generator=draw).bfloat16()  # type: ignore[union-attr]
        layer.scaling = 128**-0.5  # type: ignore[union-attr]
    return made


def cells_at(methods: Sequence[str], unit: str, **budget: Any) -> list[Cell]:
    return grid(methods, [budget], [32], None, {"budget_unit": unit})


@pytest.mark.parametrize("ratio", [0.25, 0.125])
def test_the_pool_holds_what_real_caches_take(prefill: PrefillCache, ratio: float) -> None:
    size = config_size(LlamaConfig(**LLAMA), "llama", "bfloat16")
    assert size.parameters == PARAMETERS
    cells = cells_at(["full", "origin", "mix"], "bytes", cache_ratio=ratio)
    found = capacity(size, cells, memory_of("80GB"), TOKENS)
    pool = free_bytes(size, memory_of("80GB")) - prefill_bytes(size, cells[0], TOKENS, None)
    for cell, bought in zip(cells, found, strict=True):
        config = cell.cache_config
        walked = prefill.nbytes() if config is None else storage_bytes(TriStateCache.from_prefill(prefill, config))
        assert bought.bytes_per_token == pytest.approx(walked / TOKENS, rel=0.01), cell.label
        assert bought.pool_tokens == pytest.approx(pool / (walked / TOKENS), rel=0.01)
        assert bought.sequences == pool // (bought.bytes_per_token * TOKENS)
        assert bought.step_bytes == pytest.approx(bought.sequences * walked, rel=0.01)


def test_what_fits_alone_and_the_roof() -> None:
    size = config_size(LlamaConfig(**LLAMA), "llama", "bfloat16")
    (full,) = capacity(size, [full_cell()], memory_of("h100"), 4096)
    assert full.bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert full.sequences is not None
    assert full.longest == 131072, "the model's context"
    # Weights and all caches, read once at 3.35 TB/s.
    taken = (2 * PARAMETERS + full.sequences * 4096 * full.bytes_per_token) / 3.35e12
    assert full.tokens_per_s == pytest.approx(full.sequences / taken)
    (small,) = capacity(size, [full_cell()], memory_of("24GB"), 32768)
    assert (small.sequences, small.tokens_per_s) == (0, None)
    assert small.longest is not None
    free = free_bytes(size, memory_of("24GB"))
    for tokens, fits in ((small.longest, True), (small.longest + 1, False)):
        assert (size.full_bytes(tokens) + prefill_bytes(size, full_cell(), tokens, None) <= free) is fits
    # A prompt that is read in chunks leaves more room.
    (chunked,) = capacity(size, [full_cell()], memory_of("24GB"), 32768, chunk=2048)
    assert chunked.longest is not None
    assert chunked.longest > small.longest


def test_a_second_reading_needs_the_whole_prompt_at_once() -> None:
    size = config_size(LlamaConfig(**LLAMA), "llama", "bfloat16")
    once, twice = cells_at(["mix", "mix-replay"], "bytes", cache_ratio=0.25)
    importance = 4 * 32 * 8 * TOKENS
    more = prefill_bytes(size, twice, TOKENS, None) - prefill_bytes(size, once, TOKENS, None)
    assert more == size.full_bytes(TOKENS) + importance
    mix, replayed = capacity(size, [once, twice], memory_of("24GB"), 16384)
    assert mix.sequences is not None
    assert replayed.sequences is not None
    assert 0 < replayed.sequences < mix.sequences
    assert mix.longest is not None
    assert replayed.longest is not None
    assert replayed.longest < mix.longest


def test_memory_that_cannot_be() -> None:
    size = config_size(LlamaConfig(**LLAMA), "llama", "bfloat16")
    with pytest.raises(UserError, match=r"16GB: the weights take 16.1 GB and 90% of 16.0 GB can be used: 17.8 GB"):
        capacity(size, [full_cell()], memory_of("16GB"), 4096)
    with pytest.raises(UserError, match="give a size such as 80GB, or a GPU: did you mean h100") as caught:
        memory_of("h1000")
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="--capacity=8XB: give a size such as 80GB"):
        memory_of("8XB")
    assert memory_of("H100", 1000).bandwidth == 1e12
    assert memory_of("80GB").bandwidth is None


def test_gpus_are_within_reason() -> None:
    assert list(GPUS) == sorted(GPUS)
    for name, gpu in GPUS.items():
        assert 10e9 < gpu.memory < 400e9, name
        assert 0.2e12 < gpu.bandwidth < 20e12, name
        assert gpu.source


def row(cell: Cell, metric: str, score: float) -> Row:
    what = {"model": "m", "task": "needle", "metric": metric, "method": cell.method, "cell": cell.key}
    return Row.model_validate({**what, "n": 4, "score": score, "higher_is_better": True})


def test_scores_stand_beside_the_cells_that_have_them() -> None:
    cells = cells_at(["full", "mix", "quant"], "bytes", cache_ratio=0.25)
    rows = [row(cells[0], "exact_match", 1.0), row(cells[1], "exact_match", 0.5), row(cells[1], "other", 0.1)]
    found = scores_kept(rows, cells)
    assert {key: {cell: item.score for cell, item in known.items()} for key, known in found.items()} == {
        ("needle", "exact_match"): {cells[0].key: 1.0, cells[1].key: 0.5}
    }
    with pytest.raises(UserError, match="none of these methods at these budgets"):
        scores_kept(rows[:1], cells)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A config is all that it needs."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "llama-3.1-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    asked = ["plan", "--model", str(folder), "--methods", "mix,hf:quanto-int4", "--budget-unit", "bytes"]
    with pytest.raises(SystemExit) as caught:
        main([*asked, "--cache-ratio", "0.25", "--capacity", "h100,24GB", "--context-lengths", "4096,200000"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    said = " ".join(shown.split())
    assert "llama-3.1-8b on h100, sequences of 4,096 tokens" in said
    assert "25 % mix k4v3 32.8 kB" in said
    assert "3,350 GB/s (NVIDIA H100 datasheet, SXM)" in said
    assert "llama-3.1-8b has a context of 131,072 tokens only" in said
    assert "Not one sequence fits: full up to" in said
    assert "never measured here" in said
    assert "twice" not in said
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(folder), "--methods", "mix,mix-replay", "--capacity", "24GB"])
    assert "mix-replay reads each prompt twice" in " ".join(capsys.readouterr().out.split())
    for arguments, line in (
        (["--bandwidth", "1000"], "--run and --bandwidth go with --capacity"),
        (["--capacity", "1GB"], "1GB: the weights take 16.1 GB"),
        (["--capacity", "80GB", "--run", str(tmp_path)], "results.csv"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*asked, "--cache-ratio", "0.25", *arguments])
        assert caught.value.code
        assert line in capsys.readouterr().err
