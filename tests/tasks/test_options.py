"""Options of tasks: declared once, checked alike, refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from bench.harness.options import HarnessOptions
from bench.settings.fields import setting_of, shape_of
from bench.settings.run import FIELDS
from tasks.base import Document, Metric, Task, TaskError
from tasks.fidelity import FidelityOptions, FidelityTask
from tasks.longbench.options import LongBenchOptions
from tasks.needle import NeedleOptions, NeedleTask
from tasks.options import Count, TaskOptions, wanted_by
from tasks.ruler.options import RulerOptions


class Options(TaskOptions):
    number: Count = 1
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    names: tuple[str, ...] = ("a",)
    choice: Literal["left", "right"] = "left"
    file: Path | None = None
    quick: bool = False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"numbers": 1}, "toy has no option 'numbers': did you mean number"),
        ({"number": 0}, "toy: number must be a whole number of at least 1, not 0"),
        ({"number": True}, "toy: number must be a whole number of at least 1, not True"),
        ({"number": "3"}, "toy: number must be a whole number of at least 1, not '3'"),
        ({"share": 1.5}, "toy: share must be a number above 0 and up to 1, not 1.5"),
        ({"names": [3]}, r"toy: names must be texts, not \[3\]"),
        ({"choice": "up"}, "toy: choice must be left or right, not 'up'"),
        ({"file": 3}, "toy: file must be a path, not 3"),
        ({"quick": 1}, "toy: quick must be true or false, not 1"),
    ],
)
def test_what_makes_no_sense_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said) as caught:
        Options.parse("toy", options)
    assert caught.value.usage


def test_one_value_is_a_list_of_one_and_none_is_the_default() -> None:
    found = Options.parse("toy", {"names": "b", "file": "x.txt", "number": None, "share": 1})
    assert (found.names, found.file, found.number, found.share) == (("b",), Path("x.txt"), 1, 1.0)
    assert Options.parse("toy", {}) == Options()


@pytest.mark.parametrize("model", [NeedleOptions, FidelityOptions, LongBenchOptions, RulerOptions, HarnessOptions])
def test_a_run_declares_options_as_the_tasks_do(model: type[TaskOptions]) -> None:
    """The same kind of value and the same default; a run may ask several tasks, so bounds may be wider there."""
    shared = [name for name in model.model_fields if name in FIELDS]
    assert shared
    for name in shared:
        mine, theirs = FIELDS[name], model.model_fields[name]
        assert mine.default == theirs.default, name
        if name != "gen_kwargs":
            assert shape_of(mine.annotation) == shape_of(theirs.annotation), name
        assert theirs.description is None or theirs.description[1:] in setting_of(mine).help or name in SHARED


SHARED = {"lengths", "samples", "max_length"}
"""What several tasks know in words of their own."""


def test_names_come_from_the_model_or_stand_alone() -> None:
    assert NeedleTask.option_names == tuple(NeedleOptions.model_fields)
    assert FidelityTask.option_names == tuple(FidelityOptions.model_fields)

    class Plain(Task):
        name = "plain"
        metrics = (Metric(name="m"),)
        option_names = ("lengths",)

        def load(self, settings: Any) -> list[Document]:
            return []

        def score(self, document: Any, answer: Any) -> dict[str, float]:
            return {}

    class Modelled(Plain):
        Options = Options

    assert (Plain.option_names, Modelled.option_names) == (("lengths",), tuple(Options.model_fields))
    assert wanted_by(Options, "number") == "a whole number of at least 1"
