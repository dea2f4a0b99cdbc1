"""The decode kernel: when it is chosen, that it agrees with its twin, that it compiles for GPUs which are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arkv import FORMATS
from arkv.kernels import decode
from arkv.storage import QuantizedPool, Tokens

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
interpreting = os.environ.get("TRITON_INTERPRET", "0") != "0"

SERVED: dict[str, Any] = {
    "device": torch.device("cuda"),
    "dtype": torch.bfloat16,
    "head_dim": 64,
    "group": 3,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an NVIDIA GPU of the Ampere generation with Triton."""
    monkeypatch.setattr(decode, "_has_triton", lambda: True)
    monkeypatch.setattr(decode, "_capability", lambda device: (8, 0))


# -- when it is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_supported(head_dim: int) -> None:
    assert decode.supported(**{**SERVED, "head_dim": head_dim})


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "different",
    [
        {"device": torch.device("cpu")},
        {"dtype": torch.float64},
        {"head_dim": 256},
        {"group": 32},
    ],
)
def test_not_supported(different: dict[str, Any]) -> None:
    assert not decode.supported(**{**SERVED, **different})


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("name", "found"), [("_has_triton", False), ("_capability", (7, 5))])
def test_not_supported_here(name: str, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, name, lambda *_: found)
    assert not decode.supported(**SERVED)


def test_amd_is_not_supported(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not decode.supported(**SERVED)


def test_the_library_does_not_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = spec_from_file_location("kernels_without_triton", decode.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module._has_triton()


@pytest.mark.parametrize(
    ("slots", "rows", "processors", "expected"),
    [(1000, 8, 1, 1024), (1024, 8, 132, 64), (10_000, 8, 132, 320), (64, 500, 132, 64)],
)
def test_slots_per_split(
    slots: int, rows: int, processors: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_processors", lambda device: processors)
    assert decode._slots_per_split(slots, rows, torch.device("cuda")) == expected


# -- against its twin --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("where", ["interpreter", "gpu"])
def test_agreement_with_the_twin(where: str) -> None:
    """All of ``kernel_cases.py``, in a process that imports Triton anew."""
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/arkv/kernel_cases.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-1000:]
    assert "skipped" not in run.stdout


# -- compiled for GPUs that are not here -------------------------------------------------------------------------------

Compile = Callable[[int, str | None, int], list[Any]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compile:
    """Compiles what one step would launch on a GPU of a compute capability (86 for 8.6), format and head dim."""
    if interpreting:
        pytest.skip("TRITON_INTERPRET is set")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from arkv.kernels import triton as module

    class Launcher:
        def __init__(self, kernel: Any, found: list[Any]) -> None:
            self.kernel, self.found = kernel, found

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kw: self.found.append(self.kernel.warmup(*args, grid=grid, **kw))

    def compile_for(capability: int, quant_format: str | None, dim: int) -> list[Any]:
        target = GPUTarget("cuda", capability, 32)
        absent = SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
        monkeypatch.setattr(driver, "_active", absent)
        found: list[Any] = []
        with monkeypatch.context() as patch:
            for name in ("attend_splits", "combine_splits"):
                patch.setattr(module, name, Launcher(getattr(module, name), found))
            zeros = torch.zeros(1, 2, 128, dim, dtype=torch.bfloat16)
            tokens = Tokens(zeros, zeros, torch.zeros(1, 2, 128, dtype=torch.int32), torch.zeros(1, 2, 128))
            # A new pool may have free slots: both pools are masked.
            pool = None if quant_format is None else QuantizedPool(FORMATS[quant_format], tokens, [tokens])
            decode.decode_attention(zeros[:, :, :16], tokens, pool, 1.0, True)
        return found

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compile_for


def check(found: list[Any]) -> None:
    """Both kernels are there, and the first one finds room on the smallest supported GPU."""
    attend, combine = found
    assert len(attend.asm["cubin"]) > 0
    assert len(combine.asm["cubin"]) > 0
    assert attend.metadata.shared <= 99 * 1024


@needs_triton
def test_it_compiles(compiled: Compile) -> None:
    check(compiled(80, "k4v3", 128))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("quant_format", [None, *FORMATS])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_all(compiled: Compile, capability: int, quant_format: str | None, dim: int) -> None:
    check(compiled(capability, quant_format, dim))
