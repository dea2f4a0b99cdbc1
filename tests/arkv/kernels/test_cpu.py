"""The kernels in C: that they agree with their twins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from arkv import kernels
from arkv.formats import FORMATS
from arkv.kernels.cpu import pools
from tests.arkv.kernels.cases import NF4, Case, Step, case, compare
from tests.arkv.kernels.conftest import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("built")]
EACH_FORMAT = [None, *sorted(FORMATS), "nf4"]


@pytest.fixture(scope="module", autouse=True)
def _nf4() -> Iterator[None]:
    FORMATS["nf4"] = NF4
    yield
    del FORMATS["nf4"]


def check(mine: Case, step: Step | None = None, steps: int = 20) -> None:
    assert pools.table_of(mine.tensors(), mine.formats) is not None
    compare(mine, step or Step(), kernels.make_room, kernels.attend, kernels.remember, steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
@pytest.mark.parametrize("quant_format", EACH_FORMAT)
def test_formats(quant_format: str | None, dim: int, dtype: torch.dtype) -> None:
    check(case(quant_format, dims=(dim, dim), dtype=dtype), steps=3)


@pytest.mark.parametrize("quant_format", EACH_FORMAT)
def test_many_steps(quant_format: str | None) -> None:
    check(case(quant_format, original=40, quantized=30))


@pytest.mark.parametrize("dims", [(96, 64), (64, 128), (256, 8), (24, 40)])
@pytest.mark.parametrize("quant_format", ["int8", "k4v3", "nf4"])
def test_keys_and_values_of_different_width(quant_format: str, dims: tuple[int, int]) -> None:
    check(case(quant_format, dims=dims, original=60, quantized=90), steps=5)


@pytest.mark.parametrize("group", [1, 2, 7, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_groups_and_batches(group: int, batch: int) -> None:
    check(case("int4", batch=batch), Step(group=group), steps=3)


@pytest.mark.parametrize("original,quantized", [(12, 1), (138, 128), (139, 129), (700, 3), (12, 1500)])
def test_pieces_of_any_size(original: int, quantized: int) -> None:
    check(case("k4v3", original=original, quantized=quantized), steps=3)


@pytest.mark.parametrize("softcap", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_softcap_and_sinks(softcap: float, sinks: bool, dtype: torch.dtype) -> None:
    check(case("int8", dtype=dtype), Step(softcap=softcap, sinks=sinks), steps=3)


@pytest.mark.parametrize("rate,width", [(0.0, 1), (0.0, 5), (0.0, 7), (0.1, 5), (1.0, 5)])
@pytest.mark.parametrize("positions", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("quant_format", [None, "int8"])
def test_scores(quant_format: str | None, rate: float, width: int, positions: torch.dtype) -> None:
    check(case(quant_format, original=30, quantized=20, positions=positions), Step(rate=rate, pool_width=width))


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("quant_format", [None, "int8"])
def test_scores_of_the_largest_attention(quant_format: str | None, rate: float) -> None:
    check(case(quant_format, original=30, quantized=20), Step(rate=rate, largest=True))


@pytest.mark.parametrize(
    "settings", [{"n_sink": 0, "window": 1}, {"n_sink": 4, "window": 64}, {"n_sink": 0, "window": 8}]
)
@pytest.mark.parametrize("recency", [False, True])
def test_sinks_and_windows(settings: dict[str, int], recency: bool) -> None:
    check(case("int8", original=80, quantized=20, **settings), Step(recency=recency))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("positions", [torch.int16, torch.int32], ids=str)
def test_of_equal_scores_the_newest_leaves(positions: torch.dtype, seed: int) -> None:
    # Attention does not count, so that equal scores stay equal.
    check(case("int8", ties=True, original=30, quantized=20, positions=positions, seed=seed), Step(rate=1e-30))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            mine = case("k4v3", original=300, quantized=900)
            importance = mine.importance()
            kernels.make_room(mine.rows, mine.tensors(), mine.formats, 2, 8, False)
            query, key = torch.ones(2, 9, 1, 64), torch.ones(2, 3, 1, 64)
            arguments: Any = (mine.rows, 6, mine.tensors(), mine.formats, 2, 8, 0.1, 0.0, None, importance)
            output = kernels.attend(query, key, key, *arguments)
            kernels.remember(mine.rows, mine.tensors(), mine.formats, importance, 8, 0.0, 5)
            found.append([output, *importance, *mine.tensors()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_logits_far_apart() -> None:
    """Weights that vanish are zeros, not NaN."""
    mine = case(None, layers=1, batch=1, heads=1)
    kernels.make_room(mine.rows, mine.tensors(), [], 2, 8, False)
    mine.pools[0].key.codes[0] = 300.0
    importance = mine.importance()
    query, key = torch.ones(1, 3, 1, 64), torch.ones(1, 1, 1, 64)
    kernels.attend(query, key, key, mine.rows, 0, mine.tensors(), [], 2, 8, 1.0, 0.0, None, importance)
    assert float(importance[0][0]) == 1.0
    assert float(importance[0][1:].abs().max()) == 0.0


def test_importance_unless_wanted() -> None:
    mine = case("int8")
    kernels.make_room(mine.rows, mine.tensors(), mine.formats, 2, 8, False)
    query, key = torch.randn(2, 9, 1, 64), torch.randn(2, 3, 1, 64)
    arguments: Any = (mine.rows, 6, mine.tensors(), mine.formats, 2, 8, 0.1, 0.0, None)
    assert torch.equal(
        kernels.attend(query, key, key, *arguments, []), kernels.attend(query, key, key, *arguments, mine.importance())
    )
