"""States maps on disk: one file, whoever writes first."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

from bench.names import STATES
from bench.records.states import MapRecord, StatesMap, read_maps, write_maps


def record(task: str, cell: str, tokens: int = 10) -> MapRecord:
    """A map of two layers."""
    states = StatesMap(tokens=tokens, heads=2, layers=[0, 1], original=[[0.5, 1.0]] * 2, quantized=[[0.0, 0.0]] * 2)
    return MapRecord(model="tiny", task=task, document="d", cell=cell, label=cell, map=states)


def test_the_file_is_the_same_whichever_worker_ends_first(tmp_path: Path) -> None:
    maps = [record("needle", "mix"), record("fidelity", "mix"), record("needle", "full")]
    for number, order in enumerate(permutations(maps)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for item in order:
            write_maps(folder, [item])
        assert (folder / STATES).read_bytes() == (tmp_path / "0" / STATES).read_bytes()


def test_a_newer_map_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    write_maps(tmp_path, [record("needle", "mix"), record("fidelity", "mix")])
    newer = record("needle", "mix", tokens=20)
    write_maps(tmp_path, [newer])
    assert read_maps(tmp_path) == [record("fidelity", "mix"), newer]
