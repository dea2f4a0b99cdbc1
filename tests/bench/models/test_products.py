"""Linear layers that multiply in float32 on a CPU without products of their weights' dtype."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.models import products
from bench.models.loading import load
from bench.models.products import LinearInFloat32, multiply_in_float32


class Pair(nn.Module):
    """Two layers that share their weights, and one of its own with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 48, bias=False)
        self.second = nn.Linear(48, 48, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(48, 32)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32)


def pair(dtype: torch.dtype = torch.bfloat16) -> Pair:
    torch.manual_seed(0)
    return Pair().to(dtype)


@pytest.mark.usefixtures("lacking")
def test_the_result_is_the_exact_product_rounded_once() -> None:
    model = pair()
    exact = copy.deepcopy(model.last).double()
    assert multiply_in_float32(model, None)
    hidden = torch.randn(3, 5, 48).bfloat16()
    got = model.last(hidden)
    assert got.dtype == torch.bfloat16
    # Half a step of bfloat16 in rounding, and what float32 sums are off by.
    expected = exact(hidden.double())
    assert ((got.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()


@pytest.mark.usefixtures("lacking")
def test_shared_weights_are_copied_once_and_stay_as_they_are() -> None:
    model = pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert multiply_in_float32(model, None)
    assert model.first.in_float32 is model.second.in_float32
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("lacking")
def test_too_little_memory_leaves_the_layers_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = pair()
    needed = 4 * (48 * 48 + 48 * 32)
    assert not multiply_in_float32(model, 2 * needed - 1)
    assert type(model.last) is nn.Linear
    said = capsys.readouterr().err
    assert "no instructions for products in bfloat16" in said
    assert "several times as long" in said
    assert multiply_in_float32(model, 2 * needed)


@pytest.mark.usefixtures("lacking")
def test_float32_and_layers_of_another_kind_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    model = nn.ModuleList([pair(torch.float32), Other(4, 4, dtype=torch.bfloat16)])
    assert not multiply_in_float32(model, None)


@pytest.mark.usefixtures("lacking")
def test_a_loaded_model_multiplies_so(folder: Path) -> None:
    model = load(str(folder), dtype="bfloat16", device="cpu").model
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert layers
    assert all(type(layer) is LinearInFloat32 for layer in layers)
    assert model(torch.arange(7)[None]).logits.dtype == torch.bfloat16


def test_where_the_cpu_has_such_products_nothing_changes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(products, "multiplies", lambda _: True)
    model = load(str(folder), dtype="bfloat16", device="cpu").model
    assert not any(isinstance(layer, LinearInFloat32) for layer in model.modules())
