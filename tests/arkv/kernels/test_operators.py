"""The operators: every mode of torch, compilers, fake tensors, and which kernel serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arkv import CacheConfig, kernels
from arkv.formats import FORMATS
from arkv.kernels import twin
from arkv.kernels.cpu import building, pools
from tests.arkv.conftest import compressed, prompt
from tests.arkv.kernels.cases import Case, case
from tests.arkv.kernels.conftest import needs_compiler

pytestmark = pytest.mark.usefixtures("built")


def small(quant_format: str | None = "k4v3", **settings: Any) -> Case:
    return case(quant_format, **{"original": 20, "quantized": 30, **settings})


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 1, 64, generator=random).to(device, dtype) for heads in (9, 3, 3)]


def step(mine: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """One step of two layers; outputs, and all that it changed."""
    rows, tensors, formats = mine.rows, mine.tensors(), mine.formats
    importance = mine.importance()
    kernels.make_room(rows, tensors, formats, mine.n_sink, mine.window, False)
    outputs = [
        kernels.attend(
            *(query, key, value, rows, begin, tensors, formats, mine.n_sink, mine.window),
            *(0.125, 0.0, None, importance),
        )
        for begin in (0, 6)
    ]
    kernels.remember(rows, tensors, formats, importance, mine.window, 0.0, 5)
    return [*outputs, *importance, rows, *tensors]


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setattr(building, "library_path", lambda: tmp_path / "nothing.so")
    monkeypatch.setenv("CC", "nowhere-cc")
    building.library.cache_clear()
    yield
    building.library.cache_clear()


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("stored", [torch.no_grad, torch.inference_mode], ids=["plain", "inference"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modes(mode: type[AbstractContextManager[Any]], stored: Any, served: bool, request: Any) -> None:
    """In every mode, whichever the store was made in; inputs may require gradients, outputs never do."""
    if not served:
        request.getfixturevalue("unbuilt")
    expected = step(small(), *inputs())
    with stored():
        mine = small()
    given = [tensor.requires_grad_() for tensor in inputs()]
    with mode():
        got = step(mine, *given)
    assert not any(tensor.requires_grad for tensor in got)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def _same_recursion() -> Iterator[None]:
    """Inductor leaves a higher limit of recursion behind."""
    limit = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("_same_recursion")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@needs_compiler
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    mine, its = small(), small()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            given = inputs()
            got, right = compiled(mine, *given), step(its, *given)
            for one, other in zip(got, right, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fake_tensors(device: str, dtype: torch.dtype) -> None:
    """Shapes, number types and devices, whatever tensors hold."""
    mine, given = small("int8", dtype=dtype), inputs(dtype)
    with FakeTensorMode() as mode:
        fake = [torch.empty_like(mode.from_tensor(tensor), device=device) for tensor in mine.tensors()]
        rows = torch.empty_like(mode.from_tensor(mine.rows), device=device)
        query, key, value = (torch.empty_like(mode.from_tensor(tensor), device=device) for tensor in given)
        importance = [torch.empty_like(fake[0]), torch.empty_like(fake[4])]
        kernels.make_room(rows, fake, ["int8"], 2, 8, False)
        output = kernels.attend(query, key, value, rows, 6, fake, ["int8"], 2, 8, 0.1, 0.0, None, importance)
        kernels.remember(rows, fake, ["int8"], importance, 8, 0.0, 5)
        assert (output.shape, output.dtype, output.device.type) == ((2, 1, 9, 64), dtype, device)
        for layout in (FORMATS["int8"].key, FORMATS["k4v3"].value):
            codes, scale, zero = kernels.quantize.quantize(torch.empty(5, 64, device=device), layout)
            assert codes.shape == (5, 8 * layout.bits)
            assert (scale.shape, scale.dtype) == ((5,), layout.range_dtype)
            assert (zero is None) == (not layout.levels)
        summary = kernels.score.summarize(query, key, 0.1, 1, 0, True)
        assert (summary.mean.shape, summary.mean.dtype) == ((2, 3, 1), torch.float32)
        assert summary.layer is not None
        assert summary.layer.shape == (2, 3)


# -- which kernel serves -----------------------------------------------------------------------------------------------


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the twins that have been called."""
    called: list[str] = []
    for name in ("make_room", "attend", "remember"):
        original = getattr(twin, name)
        monkeypatch.setattr(
            twin, name, lambda *given, name=name, original=original: (called.append(name), original(*given))[1]
        )
    return called


@needs_compiler
@pytest.mark.parametrize("quant_format", [None, *sorted(FORMATS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_c_serves(quant_format: str | None, dtype: torch.dtype, twins: list[str]) -> None:
    step(small(quant_format, dtype=dtype), *inputs(dtype))
    assert twins == []


@pytest.mark.parametrize("settings", [{"dtype": torch.float16}, {"positions": torch.int64}], ids=str)
def test_its_twin_serves(settings: dict[str, Any], twins: list[str]) -> None:
    step(small("int8", **settings), *inputs(settings.get("dtype", torch.float32)))
    assert twins == ["make_room", "attend", "attend", "remember"]


def test_nothing_is_compiled_unasked(unbuilt: None, twins: list[str]) -> None:
    step(small(), *inputs())
    assert twins == ["make_room", "attend", "attend", "remember"]


@needs_compiler
@pytest.mark.parametrize("method", ["window", "origin", "quant", "mix"])
@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_a_model_decodes_as_with_the_twin(llama: Any, method: str, unit: Any, request: Any, twins: list[str]) -> None:
    config = CacheConfig.for_method(method, budget_unit=unit, cache_size=32, window_size=8, quant_format="int8")
    ids = prompt(60, seed=1)
    with_c, _ = compressed(llama, ids, config, 12)
    assert twins == []
    request.getfixturevalue("unbuilt")
    with_twin, _ = compressed(llama, ids, config, 12)
    # The first token is the prefill's.
    assert twins.count("attend") == 11 * len(llama.model.layers)
    assert torch.allclose(with_c.logits, with_twin.logits, atol=1e-4)


@needs_compiler
def test_a_store_in_the_place_of_another() -> None:
    """Tables are kept by address: another store at the same one is taken as what it is."""
    score, position, key, value = small(None).tensors()
    first = pools.table_of([score, position, key, value], [])
    assert first is not None
    assert pools.table_of([score, position, key, value], []) is first
    other = pools.table_of([score, position, key.view(-1, 32), value.view(-1, 32)], [])
    assert other is not None
    assert (first.key_dim, other.key_dim) == (64, 32)


@needs_compiler
def test_few_tables_are_kept() -> None:
    kept = [small("int8", original=14, quantized=2, layers=1) for _ in range(100)]
    for mine in kept:
        assert pools.table_of(mine.tensors(), ["int8"]) is not None
    assert len(pools._TABLES) <= pools._MAX_TABLES
