"""A command does not wait for scikit-learn, which transformers would import, and which is there when it is used."""

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
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation import candidate_generator
import bench.runs.run
assert not {"sklearn", "pandas"} & set(sys.modules)
real = transformers.utils.is_sklearn_available
assert real()
for name, module in list(sys.modules.items()):
    if name.startswith("transformers."):
        assert vars(module).get("is_sklearn_available", real) is real, name
rates, found, _ = candidate_generator.roc_curve([0, 1, 1], [0.1, 0.6, 0.9])
assert (max(rates), max(found)) == (1.0, 1.0)
"""


@pytest.mark.slow
def test_a_library_that_no_command_needs_is_imported_when_it_is_used() -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, "-c", CALL]
    done = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
