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
heavy |= {"torch._dynamo.config", "torch.distributed.tensor.placement_types", "sympy", "triton"}
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
assert "torch._dynamo.config" not in sys.modules
from transformers.masking_utils import sdpa_mask
shape = {"batch_size": 1, "cache_position": torch.arange(3), "kv_length": 3, "allow_is_causal_skip": False}
assert torch.equal(sdpa_mask(**shape, use_vmap=True), sdpa_mask(**shape))
assert "torch._dynamo.config" in sys.modules
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


LATER = """
import sys
from bench.models.imports import import_lightly
import_lightly()
import torch, transformers, arkv
compiler = sys.modules["torch._dynamo"]
steps = []

@torch.compiler.disable
def disabled(x):
    steps.append(torch.compiler.is_compiling())
    return x + 1

assert disabled(1) == 2
assert sys.modules["torch._dynamo"] is compiler and torch.distributed.tensor is sys.modules["torch.distributed.tensor"]

# A submodule is asked for first: the package imports it too, and it is one.
import torch._dynamo.config as config
assert config is torch._dynamo.config and config.__spec__.loader.name == "torch._dynamo.config"
assert sys.modules["torch._dynamo"] is not compiler and torch._dynamo is sys.modules["torch._dynamo"]
assert compiler.optimize is torch._dynamo.optimize
allowed = torch._dynamo.trace_rules._allowed_callable_ids
assert id(transformers.PreTrainedModel.can_record_outputs.fget) in allowed
compiled = torch.compile(lambda x: disabled(x * 2) * 3, backend="eager")
assert compiled(torch.ones(1)).item() == 9.0
assert steps == [False, False]
from torch.distributed.tensor import DTensor
assert torch.distributed.tensor.DTensor is DTensor
assert sys.modules["torch.distributed.tensor"] is torch.distributed.tensor

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
settings = arkv.CacheConfig.for_method("origin", cache_size=32, window_size=8)
ids = torch.arange(9)[None]
with torch.no_grad(), arkv.attach(model):
    expected, found = (
        run(ids, past_key_values=arkv.TriStateCache(model, settings)).logits
        for run in (model, torch.compile(model, backend="eager"))
    )
assert torch.allclose(expected, found, atol=1e-5)
"""


@pytest.mark.slow
def test_what_is_imported_later_is_what_it_would_have_been() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATER], cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
