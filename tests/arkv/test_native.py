"""The CPU kernel in C: that it agrees with its twin, and when it is chosen."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from arkv import FORMATS, CacheConfig, kernels
from arkv.kernels import building, native
from arkv.layer import TriStateLayer
from arkv.storage import Tokens
from tests.arkv.conftest import Driver, compressed, layer_with, prompt

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    if shutil.which("cc") is not None:
        building.build()


def exactly(layer: TriStateLayer, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and probabilities in float64, from dequantized tokens."""
    tokens = layer.held()
    if layer.quantized is not None:
        tokens = Tokens.concat(tokens.map(lambda x: x), layer.quantized.dequantized(torch.float32))
    logits = query.double() @ tokens.key.double().transpose(-1, -2) * scaling
    probabilities = logits.masked_fill((tokens.position < 0).unsqueeze(2), float("-inf")).softmax(dim=-1)
    return probabilities @ tokens.value.double(), probabilities


def compare(layer: TriStateLayer, group: int = 3) -> None:
    held = layer.held()
    batch, heads, _, dim = held.key.shape
    query = torch.randn(batch, heads, group, dim).to(held.key)
    expected = layer._attend_folded(query, dim**-0.5)
    got = native.decode_attention(query, held, layer.quantized, dim**-0.5, layer.gaps)
    exact = exactly(layer, query, dim**-0.5)
    for mine, its, right in zip(got, expected, exact, strict=True):
        error, allowed = (mine - right).abs().max(), (its - right).abs().max()
        assert error <= 3 * allowed + 1e-6
        assert error < 1e-4
    assert torch.allclose(got[1].sum(-1), torch.ones(batch, heads, group), atol=1e-5)


# -- against its twin --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("gaps", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 96, 32, 256])
@pytest.mark.parametrize("quant_format", [None, *sorted(FORMATS)])
def test_formats(quant_format: str | None, dim: int, dtype: torch.dtype, gaps: float) -> None:
    compare(layer_with(quant_format, dims=(dim, dim), dtype=dtype, gaps=gaps))


@needs_compiler
@pytest.mark.parametrize(("original", "quantized"), [(1, 1), (127, 128), (128, 129), (700, 3), (5, 1500)])
def test_pieces_of_any_size(original: int, quantized: int) -> None:
    compare(layer_with("k4v3", original=original, quantized=quantized))


@needs_compiler
@pytest.mark.parametrize("group", [1, 2, 7, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_groups_and_batches(group: int, batch: int) -> None:
    compare(layer_with("int4", batch=batch), group)


@needs_compiler
def test_keys_and_values_of_different_width() -> None:
    compare(layer_with("int8", dims=(96, 64)))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    layer = layer_with("k4v3", original=300, quantized=900)
    query = torch.randn(1, 2, 3, 64).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = native.decode_attention(query, layer.held(), layer.quantized, 0.1, False)
        torch.set_num_threads(threads)
        got = native.decode_attention(query, layer.held(), layer.quantized, 0.1, False)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_torch_says_how_many_threads_there_are() -> None:
    """Also in a thread that torch has not been used in, where OpenMP has a number of its own."""
    layer = layer_with("k4v3", original=300, quantized=900)
    query = torch.randn(1, 2, 3, 64).bfloat16()
    started = []

    def decode() -> None:
        before = {path.name for path in Path("/proc/self/task").iterdir()}
        native.decode_attention(query, layer.held(), layer.quantized, 0.1, False)
        started.append(len({path.name for path in Path("/proc/self/task").iterdir()} - before))

    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            worker = threading.Thread(target=decode)
            worker.start()
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert started == [0, 2]


@needs_compiler
def test_logits_far_apart() -> None:
    """Weights that vanish are zeros, not NaN."""
    layer = layer_with(None, dtype=torch.float32)
    held = layer.held()
    held.key[:, :, 0] = 300.0
    query = torch.ones(1, 2, 3, 64)
    _, probabilities = native.decode_attention(query, held, None, 1.0, False)
    assert torch.allclose(probabilities[..., 0], torch.ones(1, 2, 3))
    assert float(probabilities[..., 1:].abs().max()) == 0.0


@needs_compiler
@pytest.mark.parametrize("method", ["window", "origin", "quant", "mix"])
@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_a_model_decodes_as_with_its_twin(llama: Any, method: str, unit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = native.decode_attention
    monkeypatch.setattr(native, "decode_attention", lambda *given: calls.append(1) or original(*given))
    ids, found = prompt(60, seed=1), {}
    for attention in ("fused", "torch"):
        config = CacheConfig.for_method(
            method, budget_unit=unit, cache_size=32, window_size=8, quant_format="int8", attention=attention
        )
        found[attention], _ = compressed(llama, ids, config, 12)
        # The first token is the prefill's.
        assert len(calls) == 11 * len(llama.model.layers)
    assert torch.allclose(found["fused"].logits, found["torch"].logits, atol=1e-4)


# -- when it is chosen -------------------------------------------------------------------------------------------------

SERVED: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "head_dim": 64, "group": 3}


@needs_compiler
def test_found() -> None:
    assert kernels.find(**SERVED) is native.decode_attention


@pytest.mark.parametrize(
    "different",
    [{"device": torch.device("meta")}, {"dtype": torch.float16}, {"head_dim": 257}, {"group": 65}],
)
def test_not_supported(different: dict[str, Any]) -> None:
    assert not native.supported(**{**SERVED, **different})


def test_nothing_is_compiled_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(building, "library_path", lambda: tmp_path / "nothing.so")
    building.library.cache_clear()
    try:
        assert kernels.find(**SERVED) is None
        driver = Driver(CacheConfig.for_method("mix", cache_size=64, window_size=8), dim=64)
        for seed, tokens in enumerate([100, 1, 1]):
            assert driver.feed(*driver.random(tokens, seed)).isfinite().all()
    finally:
        building.library.cache_clear()
