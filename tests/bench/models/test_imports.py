"""A command does not wait for libraries that transformers would import, and which are there when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.bench.conftest import quiet_environment
from tests.conftest import ROOT

CALL = """
import sys
from bench.models.imports import import_lightly
import_lightly()
import_lightly()
import torch, transformers
from transformers import AutoModelForCausalLM, cache_utils
from transformers.generation import candidate_generator
from transformers.quantizers import quantizer_hqq
import bench.runs.run
heavy = {"sklearn", "pandas", "hqq", "scipy.optimize", "scipy.stats"}
if not torch.accelerator.is_available():
    heavy.add("triton")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
late = {"transformers.cache_utils", "transformers.quantizers.quantizer_hqq"}

def is_real(check, real, late=()):
    assert real()
    for name, module in list(sys.modules.items()):
        if name.startswith(("transformers.", "torch.")) and name not in late:
            assert vars(module).get(check, real) is real, name

is_real("is_sklearn_available", transformers.utils.is_sklearn_available)
is_real("is_hqq_available", transformers.utils.is_hqq_available, late)
is_real("is_scipy_available", transformers.utils.is_scipy_available)
from transformers.loss import loss_for_object_detection
assert [list(item) for item in loss_for_object_detection.linear_sum_assignment([[1, 0], [0, 1]])] == [[0, 1], [1, 0]]
is_real("has_triton_package", torch.utils._triton.has_triton_package)
rates, found, _ = candidate_generator.roc_curve([0, 1, 1], [0.1, 0.6, 0.9])
assert (max(rates), max(found)) == (1.0, 1.0)

from bench.methods.hf import fill, layer_settings
layer = cache_utils.HQQQuantizedLayer(nbits=4, **layer_settings("hqq"))
keys = torch.linspace(-1, 1, 2 * 64 * 16).reshape(1, 2, 64, 16)
fill(layer, keys, -keys, "hqq", 4)
assert layer.quantizer is sys.modules["hqq.core.quantize"].Quantizer
read, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
assert 0 < (read[:, :, :64] - keys).abs().max() < 0.01
is_real("is_hqq_available", transformers.utils.is_hqq_available)
quantizer = quantizer_hqq.HqqHfQuantizer(transformers.HqqConfig(nbits=4))
assert "scale" in quantizer.hqq_keys, quantizer.hqq_keys
assert isinstance(quantizer_hqq.HQQLinear.weight, property)
"""


@pytest.mark.slow
def test_a_library_that_no_command_needs_is_imported_when_it_is_used() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("hqq")
    command = [sys.executable, "-c", CALL]
    done = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
