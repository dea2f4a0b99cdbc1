"""The Triton kernels: when they are chosen, that they agree with their twin, that they compile for GPUs which are not
here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from arkv.formats import FORMATS, Format
from arkv.kernels import gpu
from arkv.pools import Part, Plane, Pool
from arkv.store import Store
from tests.arkv.kernels.gpu_cases import TABLE, kernel_modules

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
interpreting = os.environ.get("TRITON_INTERPRET", "0") != "0"

SERVED: dict[str, Any] = {
    "device": torch.device("cuda"),
    "dtype": torch.bfloat16,
    "key_dim": 64,
    "value_dim": 64,
    "group": 3,
}


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an NVIDIA GPU of the Ampere generation with Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu, "_has_triton", lambda: True)
    monkeypatch.setattr(gpu, "_capability", lambda device: (8, 0))


# -- when they are chosen ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_supported(dim: int) -> None:
    assert gpu.supported(**{**SERVED, "key_dim": dim})


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    "different",
    [
        {"device": torch.device("cpu")},
        {"dtype": torch.float64},
        {"key_dim": 512},
        {"value_dim": 512},
        {"group": 64},
    ],
)
def test_not_supported(different: dict[str, Any]) -> None:
    assert not gpu.supported(**{**SERVED, **different})


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(("name", "found"), [("_has_triton", False), ("_capability", (7, 5))])
def test_not_supported_here(name: str, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, name, lambda *_: found)
    assert not gpu.supported(**SERVED)


@pytest.mark.usefixtures("ampere")
def test_amd_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not gpu.supported(**SERVED)


@pytest.mark.usefixtures("ampere")
def test_the_interpreter_serves_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.supported(**{**SERVED, "device": torch.device("cpu")})


def test_the_library_does_not_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = spec_from_file_location("kernels_without_triton", gpu.__file__)
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
    monkeypatch.setattr(gpu, "_processors", lambda device: processors)
    assert gpu._slots_per_split(slots, rows, torch.device("cuda")) == expected


# -- against their twin ------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("where", ["interpreter", "gpu"])
def test_agreement_with_the_twin(where: str) -> None:
    """All of ``gpu_cases.py``, in a process that imports Triton anew."""
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/arkv/kernels/gpu_cases.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-1000:]
    assert "skipped" not in run.stdout


# -- compiled for GPUs that are not here -------------------------------------------------------------------------------

Compile = Callable[..., dict[str, Any]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compile:
    """Compiles what one step would launch on a GPU of a compute capability (86 for 8.6), by kernel."""
    if interpreting:
        pytest.skip("TRITON_INTERPRET is set")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Launcher:
        def __init__(self, module: Any, name: str, found: dict[str, Any]) -> None:
            self.name, self.kernel, self.found = name, getattr(module, name), found

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kw: self.found.update({self.name: self.kernel.warmup(*args, grid=grid, **kw)})

    def compile_for(
        capability: int,
        number_format: Format | None,
        dim: int,
        group: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        softcap: float = 0.0,
    ) -> dict[str, Any]:
        target = GPUTarget("cuda", capability, 32)
        absent = SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
        monkeypatch.setattr(driver, "_active", absent)
        found: dict[str, Any] = {}
        numbers = torch.zeros(256, dim, dtype=dtype)
        pools = [Pool(torch.zeros(256), torch.zeros(256, dtype=torch.int32), Plane(numbers), Plane(numbers))]
        counts = np.array([128, 128])
        if number_format is not None:
            key, value = number_format.key, number_format.value
            center = torch.zeros(2, dim, dtype=torch.bfloat16) if key.centered else None
            planes = (
                Plane(*layout.encode_rotated(numbers.float()), mean, layout)
                for layout, mean in ((key, center), (value, None))
            )
            pools.append(Pool(pools[0].score, pools[0].position, *planes))
        part = Part(list(pools), [torch.from_numpy(counts)] * len(pools))
        store = Store([part], np.array([300, 300]), np.array([0, 0]), [counts] * len(pools))
        with monkeypatch.context() as patch:
            for name, module in kernel_modules().items():
                patch.setattr(module, name, Launcher(module, name, found))
            gpu.make_room(store.rows, store.pools, 4, 32, False)
            query, token = torch.zeros(1, 2 * group, 1, dim, dtype=dtype), torch.zeros(1, 2, 1, dim, dtype=dtype)
            importance = [torch.zeros(pool.slots) for pool in store.pools]
            gpu.attend(query, token, token, store.rows, 0, store.pools, 4, 32, 1.0, softcap, None, importance)
        return found

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compile_for


def check(found: dict[str, Any]) -> None:
    """All kernels are there, and find room on the smallest supported GPU."""
    assert sorted(found) == sorted(kernel_modules())
    for kernel in found.values():
        assert len(kernel.asm["cubin"]) > 0
        assert kernel.metadata.shared <= 99 * 1024


@needs_triton
@pytest.mark.slow
def test_it_compiles(compiled: Compile) -> None:
    check(compiled(80, FORMATS["k4v3"], 128))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("number_format", [None, *FORMATS.values(), TABLE], ids=lambda item: item and item.name)
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_all(compiled: Compile, capability: int, number_format: Format | None, dim: int) -> None:
    check(compiled(capability, number_format, dim))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "different",
    [{"group": gpu.MAX_GROUP}, {"dtype": torch.float32}, {"dtype": torch.float16, "softcap": 50.0}],
)
def test_it_compiles_at_the_limits(compiled: Compile, different: dict[str, Any]) -> None:
    check(compiled(80, FORMATS["int4"], gpu.MAX_HEAD_DIM, **different))
