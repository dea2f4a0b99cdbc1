"""What tests of the C functions share."""

from __future__ import annotations

import shutil

import pytest

from arkv.kernels.cpu import building

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def built() -> None:
    """The library for this machine is there, where it can be compiled."""
    if shutil.which("cc") is not None:
        building.build()
