"""What every test stands on: quiet libraries, no network, and the evaluation rows beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read by the libraries when they are imported, hence before anything else. A variable that is set already wins.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]


LONGEST = ("test_setup_env.py", "test_wheels.py", "test_harness.py", "test_ray.py", "test_official.py", "test_peak.py")
"""Files whose slow tests take longest: they come first, so that no worker has one of them left at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow") is not None
        return LONGEST.index(item.path.name) if slow and item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of evaluation rows: ``../shared/data`` beside the repository, or what ``ARKV_TEST_DATA`` names."""
    if named := os.environ.get("ARKV_TEST_DATA"):
        folder = Path(named)
        if not folder.is_dir():
            pytest.fail(f"ARKV_TEST_DATA names no folder: {folder}")
        return folder
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no evaluation rows: neither ../shared/data nor ARKV_TEST_DATA")
    return folder
