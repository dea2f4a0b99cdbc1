"""Divergence over the position: the numbers, and their figure."""

from __future__ import annotations

import pytest

from bench.judge.curve import curve_rows
from bench.records.sample import Sample
from bench.report.figures.curve import curve_figure
from tasks.base import Compared
from tests.bench.lines import sample as make
from tests.bench.report.test_report import row


def sample(cell: str, kl: list[float] | None, document: str = "d0") -> Sample:
    compared = None if kl is None else Compared(kl=tuple(kl), agrees=(True,), delta_nll=(0.0,))
    return make(document, cell, **({} if kl is None else {"text": None, "token_ids": None}), compared=compared)


def test_mean_and_percentile_of_each_position() -> None:
    samples = [sample("mix", [float(i), 2.0 * i, 5.0][: 2 + (i == 1)], f"d{i}") for i in range(1, 41)]
    first, second, third = curve_rows([*samples, sample("text", None)])
    assert (first.position, first.n, first.kl, first.kl_p95) == (1, 40, 20.5, 38.0)
    assert (second.kl, second.kl_p95) == (41.0, 76.0)
    assert (third.position, third.n, third.kl, third.kl_p95) == (3, 1, 5.0, 5.0)
    assert {point.cell for point in (first, second, third)} == {"mix"}


def test_of_few_prompts_the_percentile_is_the_largest() -> None:
    (point,) = curve_rows([sample("mix", [0.1], "a"), sample("mix", [0.3], "b")])
    assert (point.kl, point.kl_p95) == (pytest.approx(0.2), 0.3)


def test_the_figure_has_a_line_per_method_and_none_for_full() -> None:
    rows = [row("full", 0.0), row("mix", 0.1, cache_size=512)]
    cells = [item.cell for item in rows]
    samples = [sample(cells[0], [0.0, 0.0, 0.0]), sample(cells[1], [0.1, 0.0, 0.2])]
    figure = curve_figure("kl", rows, samples)
    assert figure is not None
    svg = figure.inline_svg()
    assert "mix" in svg
    assert ">0.1</text>" in svg
    assert "full</" not in svg
    assert "95th percentile" in figure.caption
    assert curve_figure("kl", rows, samples[:1]) is None
    assert curve_figure("kl", rows, [sample(cells[1], None)]) is None
