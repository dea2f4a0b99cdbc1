"""The C functions as compiled for processors with narrower vectors than this one's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from arkv.formats import FORMATS
from arkv.kernels.cpu import building
from tests.arkv.kernels import test_cpu, test_quantize, test_reread, test_score
from tests.arkv.kernels.cases import NF4, Step, case
from tests.arkv.kernels.conftest import needs_compiler

FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
pytestmark = needs_compiler


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("x86-64", marks=pytest.mark.skipif("sse2" not in FLAGS, reason="another kind of processor")),
        pytest.param("haswell", marks=pytest.mark.skipif("avx2" not in FLAGS, reason="a processor without AVX2")),
    ],
    autouse=True,
)
def compiled_for(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("kernels") / "native.so"
    options = tuple(f"-march={request.param}" if option == "-march=native" else option for option in building._OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_OPTIONS", options)
        patch.setattr(building, "library_path", lambda: path)
        building.library.cache_clear()
        building.build()
        yield
    building.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("quant_format", [None, *sorted(FORMATS), "nf4"])
def test_steps(quant_format: str | None, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "nf4", NF4)
    test_cpu.check(case(quant_format, dims=(dim, dim), dtype=dtype), Step(softcap=5.0, sinks=True), steps=3)


@pytest.mark.parametrize("dim", [64, 80, 6])
@pytest.mark.parametrize("length", [32, 500])
def test_score_of_prompts(dim: int, length: int) -> None:
    test_score.compare(dim=dim, length=length, tiles=False)


@pytest.mark.parametrize("name", sorted(test_quantize.LAYOUTS))
def test_quantizing(name: str) -> None:
    test_quantize.test_random_tokens(name, 64, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (7, 5)], ids=str)
def test_rereading(dims: tuple[int, int], dtype: torch.dtype) -> None:
    test_reread.compare(dims=dims, dtype=dtype)
