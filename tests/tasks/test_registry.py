from __future__ import annotations

from collections.abc import Iterable

import pytest

from tasks.base import Task, TaskError
from tasks.needle import NeedleTask
from tasks.registry import TASKS, get_task, register, split_spec, split_specs


class Parted(NeedleTask):
    part_names = ("a", "b", "samsum")

    def __init__(self, parts: tuple[str, ...] = (), size: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.size = size


class Elsewhere:
    """A source of one more task."""

    def get(self, name: str) -> Task | None:
        return Parted(size=7) if name == "gsm8k" else None

    def names(self) -> Iterable[str]:
        return ["gsm8k"]


@pytest.fixture(autouse=True)
def _own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.registry.TASKS", dict(TASKS))
    register("parted", f"{__name__}:Parted", "a task with parts", has_parts=True)


def test_entries_are_described_and_load() -> None:
    for name, entry in TASKS.items():
        assert entry.description
        assert "\n" not in entry.description
        assert get_task(name).name == name


def test_a_list_is_put_together_again() -> None:
    assert split_specs(["parted:a", "b", "gsm8k", "parted:b", "samsum", "a", "needle", "a"]) == (
        "parted:a,b",
        "gsm8k",
        "parted:b,samsum,a",
        "needle",
        "a",
    )
    assert split_specs(["parted", "a"]) == ("parted", "a"), "without a colon no part follows"
    assert split_specs(["needle:a", "b"]) == ("needle:a", "b"), "needle has no parts"
    assert split_specs(["needle", "gsm8k", "needle"]) == ("needle", "gsm8k")
    assert split_specs([]) == ()


def test_a_misspelt_part_is_recognised() -> None:
    with pytest.raises(TaskError, match="unknown task 'samsun': did you mean longbench:samsum") as caught:
        get_task("samsun", fallback=Elsewhere())
    assert caught.value.usage


def test_parts_and_arguments_reach_the_class() -> None:
    import sys

    task = get_task(" parted:a, b", size=3)
    assert type(task) is sys.modules[__name__].Parted
    assert (task.parts, task.size) == (("a", "b"), 3)
    assert get_task("parted").parts == ()


@pytest.mark.parametrize("spec", ["", ":a", "parted:", "parted:a,,b", "needle:a", "gsm8k:a"])
def test_malformed_specs(spec: str) -> None:
    with pytest.raises(TaskError) as caught:
        get_task(spec, fallback=Elsewhere())
    assert caught.value.usage


def test_split_spec() -> None:
    assert split_spec("longbench:trec,lcc") == ("longbench", ("trec", "lcc"))
    assert split_spec("needle") == ("needle", ())


def test_fallback_and_unknown_names() -> None:
    found = get_task("gsm8k", fallback=Elsewhere())
    assert found.size == 7
    with pytest.raises(TaskError, match=r"unknown task 'gsm8'.*gsm8k") as caught:
        get_task("gsm8", fallback=Elsewhere())
    assert caught.value.usage
    with pytest.raises(TaskError, match=r"unknown task 'needel'.*needle"):
        get_task("needel", fallback=Elsewhere())
    with pytest.raises(TaskError, match=r"unknown task 'gsm8k'.*known: .*needle"):
        get_task("gsm8k")


def test_registering() -> None:
    with pytest.raises(ValueError, match=r"'needle' is registered already: tasks\.needle:NeedleTask"):
        register("needle", "elsewhere:Task", "again")
    for name in ("", "a:b", "a,b", "a b"):
        with pytest.raises(ValueError, match="no colon"):
            register(name, "elsewhere:Task", "malformed")
    with pytest.raises(ValueError, match="module:Class"):
        register("other", "elsewhere.Task", "malformed")
