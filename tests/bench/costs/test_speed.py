"""Timings: batches, fixed memory, what cannot be timed, and a folder that is gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cli import main
from bench.costs import bandwidth
from bench.costs import speed as timed
from bench.costs.speed import SpeedBench
from bench.errors import UserError
from bench.methods.grid import grid
from bench.names import CEILING, FULL, FUSED
from bench.records.timing import Timing, Untimed, read_speed_record, read_timings
from bench.runs.timings import Timings
from bench.telemetry import Peak, free_memory_bytes

LENGTH = 120
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Of the tiny model: layers, key and value, KV heads, head dim, bytes of a float."""


def bench_of(tiny: Any, methods: Sequence[str] = ("origin",), ratio: float = 0.25, **more: Any) -> SpeedBench:
    cells = grid(methods, [{"cache_ratio": ratio}], [8], None, {"budget_unit": "bytes"})
    return SpeedBench(tiny.model, cells, list(range(1, 200)), 2, **more)


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_is_copies_of_one_prompt(tiny: Any, shared: bool) -> None:
    bench = bench_of(tiny, ("origin", "mix"), batch_sizes=(1, 3), shared_prefill=shared)
    found = [item for item in bench.measure(LENGTH, 0, bandwidth=1e9) if isinstance(item, Timing)]
    names = [FULL, FUSED, CEILING, "origin", "mix"]
    assert [(item.method, item.batch_size) for item in found] == [(name, rows) for name in names for rows in (1, 3)]
    for one, three in zip(found[::2], found[1::2], strict=True):
        assert three.kv_bytes == pytest.approx(3 * one.kv_bytes, rel=0.01)
        assert three.decode_tokens_per_s == pytest.approx(3000 / three.tpot_ms)
        # One reading of one prompt.
        assert (one.prefill_s, one.ttft_ms) == (three.prefill_s, three.ttft_ms)
        assert not three.one_by_one
        assert (three.step_bytes or 0) - three.kv_bytes == bandwidth.weight_bytes(tiny.model)
        assert three.bandwidth == 1e9
    full, ceiling = found[0], found[4]
    assert full.kv_bytes == (LENGTH + 2) * TOKEN_BYTES
    assert ceiling.kv_bytes == LENGTH // 4 * TOKEN_BYTES
    # The two further caches beside the grid compress nothing.
    assert [item.compress_s is None for item in found[::2]] == [True, True, True, False, False]


def test_the_largest_batch_in_a_memory(tiny: Any) -> None:
    room = 5 * (LENGTH + 2) * TOKEN_BYTES
    found = {item.method: item for item in bench_of(tiny, kv_memory=[room], batch_sizes=()).measure(LENGTH, 0)}
    assert all(isinstance(item, Timing) and item.kv_memory == room for item in found.values())
    assert found[FULL].batch_size == 5
    assert found["origin"].batch_size > 15
    for item in found.values():
        assert isinstance(item, Timing)
        assert item.kv_bytes <= room < item.kv_bytes * (1 + 1 / item.batch_size) * 1.01


def test_what_does_not_fit_says_what_would_and_the_rest_goes_on(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    each = LENGTH * TOKEN_BYTES
    monkeypatch.setattr(timed, "free_memory_bytes", lambda device: 10 * each)
    bench = bench_of(tiny, kv_memory=[each // 2], batch_sizes=(2, 20))
    found = list(bench.measure(LENGTH, 0))
    said = {(item.cell, item.batch_size): item.error for item in found if isinstance(item, Untimed)}
    assert said[FULL, 20] == "20 caches take 1.2 MB; 614.4 kB are free, of which 90% count: 9 would fit"
    assert (
        "one sequence takes 62.5 kB: give --kv-memory as much; 30.7 kB would hold one of about 59 tokens"
        in (said[FULL, None])
    )
    assert {item.method for item in found if isinstance(item, Timing) and item.kv_memory} == {CEILING, "origin"}
    assert (FULL, 2) in {(item.method, item.batch_size) for item in found if isinstance(item, Timing)}
    # It is said once.
    assert not [item for item in bench.measure(LENGTH, 1) if isinstance(item, Untimed)]


def test_a_budget_that_new_tokens_fill_has_no_ceiling(tiny: Any) -> None:
    (said,) = [item for item in bench_of(tiny, ratio=0.01).measure(LENGTH, 0) if isinstance(item, Untimed)]
    assert said.line == (
        "ceiling 1 % of each prompt's tokens, a batch of 1 behind 120 tokens: a budget of 1 tokens is not more than "
        "--new-tokens=2, which are a part of it"
    )


def test_rows_that_share_no_forward_are_read_one_by_one(tiny: Any) -> None:
    if find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed")
    bench = bench_of(tiny, ("kvpress:knorm", "kvpress:adakv+knorm"), batch_sizes=(2,))
    found = {item.method: item for item in bench.measure(LENGTH, 0) if isinstance(item, Timing)}
    assert {name for name, item in found.items() if item.one_by_one} == {"kvpress:adakv+knorm"}
    masked = found["kvpress:adakv+knorm"]
    assert masked.kv_bytes > 2 * LENGTH * TOKEN_BYTES
    assert (masked.step_bytes or 0) - masked.kv_bytes == 2 * (bandwidth.weight_bytes(tiny.model) or 0)


def test_the_order_is_turned_and_what_is_done_left_out(tiny: Any) -> None:
    bench = bench_of(tiny)
    first, second = (list(bench.measure(LENGTH, repetition)) for repetition in (0, 1))
    names = [item.cell for item in first]
    assert [item.cell for item in second] == names[1:] + names[:1]
    done = {item.work for item in first[1:]}
    assert [item.cell for item in bench.measure(LENGTH, 0, done)] == [FULL]
    assert list(bench.measure(LENGTH, 0, done | {first[0].work})) == []


def test_weights_of_a_step() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    tied, apart = (LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tie)) for tie in (True, False))
    # The head is read, be it the table of embeddings or a matrix of its own.
    read = 4 * sum(parameter.numel() for parameter in tied.parameters())
    assert bandwidth.weight_bytes(tied) == bandwidth.weight_bytes(apart) == read
    experts = SimpleNamespace(num_local_experts=8)
    assert bandwidth.weight_bytes(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda **_: experts))) is None


def test_the_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bandwidth.BUFFER, "cpu", 1 << 20)
    cpu = torch.device("cpu")
    assert bandwidth.measured_bandwidth(cpu) > 1e6
    assert (free_memory_bytes(cpu) or 1) > 0
    peak = Peak(cpu)
    held = torch.ones(1 << 24)
    assert peak.nbytes is None or peak.nbytes > held.numel() * 4


def test_a_folder_is_gone_on_with(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bandwidth.BUFFER, "cpu", 1 << 20)
    few = ["--context-lengths", "100,200", "--cache-ratio", "0.25", "--budget-unit", "bytes", "--new-tokens", "2"]
    common = ["speed", "--model", str(tiny_folder), "--dtype", "float32", "--device", "cpu", *few]
    line = [*common, "--methods", "full-fused,origin", "--batch-sizes", "1,2", "--outdir", str(tmp_path / "speed")]

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    code, said = call(*line, "--repetitions", "1")
    assert code == 0, said
    threads = torch.get_num_threads()
    assert f"cpu, {threads} thread{'' if threads == 1 else 's'}: medians of 1 repetition" in " ".join(said.split())
    assert "Time of a step over the context" in said
    first = read_timings(tmp_path / "speed/speed.csv")
    assert len(first) == 2 * 2 * 4
    assert read_speed_record(tmp_path / "speed").finished is not None
    # As if it had been killed: a row is missing.
    rows = (tmp_path / "speed/speed.csv").read_text().splitlines(keepends=True)
    (tmp_path / "speed/speed.csv").write_text("".join(rows[:-1]))
    code, said = call(*line, "--repetitions", "2", "--kv-memory", "100kB,1kB")
    assert code == 1, said
    assert "not timed: full, 1.0 kB of KV behind 100 tokens: one sequence takes" in " ".join(said.split())
    again = read_timings(tmp_path / "speed/speed.csv")
    assert again[: len(first) - 1] == first[:-1]
    batches = {(item.repetition, item.context_length, item.batch_size, item.kv_memory) for item in again}
    assert {(0, 200, 2, None), (1, 100, 1, None)} <= batches
    assert {item.kv_memory for item in again} == {None, 100_000}
    assert len(read_speed_record(tmp_path / "speed").failures) == 2 * 4 + 2
    others = Timings(tmp_path / "speed", {"name": "tiny"}, {"new_tokens": 3})
    with pytest.raises(UserError, match="of other terms: another model, another new tokens; give another --outdir"):
        others.__enter__()
    page = tmp_path / "page.html"
    assert call("report", str(tmp_path / "speed"), "--html", str(page), "--figures", str(tmp_path / "figures"))[0] == 0
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"speed-1", "speed-1-throughput-100", "speed-1-throughput-200"}
    assert "not timed: full, 1.0 kB of KV behind 100 tokens" in page.read_text()
