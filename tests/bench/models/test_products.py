"""Linear layers with copies of their weights, with which products on a CPU are faster."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.models import products
from bench.models.loading import load
from bench.models.products import LinearInFloat32, LinearInOrder, multiply_faster


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
    assert multiply_faster(model, None)
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
    assert multiply_faster(model, None)
    assert model.first.copied is model.second.copied
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("lacking")
def test_too_little_memory_leaves_the_layers_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = pair()
    needed = 4 * (48 * 48 + 48 * 32)
    assert not multiply_faster(model, 2 * needed - 1)
    assert type(model.last) is nn.Linear
    said = capsys.readouterr().err
    assert "no instructions for products in bfloat16" in said
    assert "several times as long" in said
    assert multiply_faster(model, 2 * needed)


@pytest.mark.usefixtures("lacking")
def test_float32_and_layers_of_another_kind_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    model = nn.ModuleList([pair(torch.float32), Other(4, 4, dtype=torch.bfloat16)])
    assert not multiply_faster(model, None)


@pytest.mark.usefixtures("lacking")
def test_a_loaded_model_multiplies_so(folder: Path) -> None:
    model = load(str(folder), dtype="bfloat16", device="cpu").model
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert layers
    assert all(type(layer) is LinearInFloat32 for layer in layers)
    assert model(torch.arange(7)[None]).logits.dtype == torch.bfloat16


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies", lambda _: True)


needs_bfloat16 = pytest.mark.skipif(
    not products.multiplies(torch.bfloat16), reason="this CPU has no products in bfloat16"
)


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 5, 32, 300])
def test_weights_in_order_give_the_same_to_the_bit(rows: int) -> None:
    model = pair()
    hidden = torch.randn(2, rows, 48).bfloat16()
    expected = [layer(hidden) for layer in (model.first, model.last)]
    assert multiply_faster(model, None)
    assert all(isinstance(layer, LinearInOrder) for layer in (model.first, model.second, model.last))
    assert model.first.copied is model.second.copied
    with torch.no_grad():
        for layer, before in zip((model.first, model.last), expected, strict=True):
            assert torch.equal(layer(hidden), before)
            # As the last token of each row is given to the output embeddings.
            assert torch.equal(layer(hidden[:, -1:]), before[:, -1:])


@needs_bfloat16
def test_too_little_memory_for_weights_in_order_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    needed = 2 * (48 * 48 + 48 * 32)
    assert not multiply_faster(pair(), 2 * needed - 1)
    assert "decoding takes up to twice as long" in capsys.readouterr().err
    assert multiply_faster(pair(), 2 * needed)


@pytest.mark.usefixtures("having")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_that_the_cpu_multiplies_are_left_alone(dtype: torch.dtype) -> None:
    assert not multiply_faster(pair(dtype), None)


@needs_bfloat16
def test_a_loaded_model_has_its_weights_in_order(folder: Path) -> None:
    model = load(str(folder), dtype="bfloat16", device="cpu").model
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert layers
    assert all(type(layer) is LinearInOrder for layer in layers)
    assert model(torch.arange(7)[None]).logits.dtype == torch.bfloat16
