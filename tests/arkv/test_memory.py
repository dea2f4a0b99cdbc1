"""True bytes, found by a walk of our own and by arithmetic on shapes."""

from __future__ import annotations

import collections
import io
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from arkv import FORMATS, CacheConfig, PrefillCache, TriStateCache, attach, storage_bytes
from tests.arkv.conftest import PUBLISHED, SHAPE, feed, forward, gemma3, prompt, spread, table_bytes

W = 8
METADATA = 6
"""Position (int16) and score (float32) of a slot."""


def pickled_bytes(item: Any) -> int:
    """Bytes of every tensor that pickling ``item`` would have to store: a walk that shares nothing with the library."""
    storages: dict[int, int] = {}

    class Walk(pickle.Pickler):
        def persistent_id(self, found: Any) -> str | None:
            if isinstance(found, torch.Tensor):
                storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
                return "tensor"
            return None

    Walk(io.BytesIO()).dump(item)
    return sum(storages.values())


def stock_bytes(cache: DynamicCache) -> int:
    """Bytes of a full cache, of its shapes alone."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.fixture(scope="module")
def half() -> Any:
    """Head dim 64 in bfloat16, as models are run."""
    shape = {**SHAPE, "head_dim": 64, "num_hidden_layers": 2}
    return spread(LlamaForCausalLM(LlamaConfig(**shape)), seed=8, deviation=0.1).to(torch.bfloat16)


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number_format", sorted(FORMATS))
@pytest.mark.parametrize("method", PUBLISHED)
def test_bytes_are_the_sum_of_all_slots(half: Any, method: str, number_format: str) -> None:
    size = 100
    taus = {"tau1": 1.0, "tau2": 1.0, "tau3": 1.0} if method == "mix" else {}
    config = CacheConfig.for_method(method, cache_size=size, window_size=W, quant_format=number_format, **taus)
    cache = TriStateCache(half, config)
    full = DynamicCache(config=half.config)
    ids = prompt(300, seed=1, batch=2)
    forward(half, full, ids)
    assert stock_bytes(full) == 2 * 2 * 300 * 2 * 64 * 2 * 2 == storage_bytes(full.layers)

    def expected() -> float:
        original = 2 * 64 * 2 + METADATA
        quantized = FORMATS[number_format].bytes_per_token(64, 64) + METADATA
        # Every sample takes what its own budget asks for, and no more.
        slots = [item for layer in cache.layers for item in layer.slots]
        assert len(slots) == 2 * 2
        assert all(W + sum(item) == size for item in slots)
        once = table_bytes(2) + FORMATS[number_format].bytes_per_head(64) if config.quantizes else table_bytes(1)
        return sum(2 * (once + (W + item.original) * original + item.quantized * quantized) for item in slots)

    with attach(half):
        forward(half, cache, ids)
        assert cache.nbytes() == pickled_bytes(cache) == storage_bytes(cache) == expected()
        for _ in feed(half, cache, prompt(5, seed=2, batch=2)):
            assert cache.nbytes() == pickled_bytes(cache) == expected()
    if method == "mix":
        assert any(item.quantized for layer in cache.layers for item in layer.slots)


@pytest.mark.parametrize("method", PUBLISHED)
def test_bytes_of_a_cache_that_is_not_full_yet(half: Any, method: str) -> None:
    """It grows in steps, never beyond what the full budget takes, and nothing of the prompt is kept alive."""
    config = CacheConfig.for_method(method, cache_size=150, window_size=W)
    cache = TriStateCache(half, config)
    most = 2 * 2 * (150 * (2 * 64 * 2 + METADATA) + table_bytes(2 if config.quantizes else 1))
    ids = prompt(160, seed=3)
    with attach(half):
        forward(half, cache, ids[:, :70])
        # Nothing can become Quantized yet, and there is no slot for it.
        assert cache.nbytes() == 2 * 2 * (2 * 70 * (2 * 64 * 2 + METADATA) + table_bytes(1))
        for _ in feed(half, cache, ids[:, 70:]):
            assert cache.nbytes() == pickled_bytes(cache)
            assert cache.nbytes() <= most


def test_a_quarter_of_the_tokens_takes_a_quarter_of_the_bytes(half: Any) -> None:
    """Positions and scores add a forty-third at head dim 64, and the row table a few bytes: 25.6 %."""
    ids = prompt(1000, seed=4)
    full = DynamicCache(config=half.config)
    forward(half, full, ids)
    shares = {}
    for method in PUBLISHED:
        cache = TriStateCache(half, CacheConfig.for_method(method, cache_size=250))
        with attach(half):
            forward(half, cache, ids)
            for _ in feed(half, cache, prompt(3, seed=5)):
                pass
            shares[method] = cache.nbytes() / stock_bytes(full)
            for _ in feed(half, cache, prompt(3, seed=5)):
                pass
        assert cache.nbytes() / stock_bytes(full) == shares[method]
    assert 0.25 < shares["window"] == shares["origin"] <= 0.2561
    # fp8 in the place of bfloat16 for all but the window.
    assert shares["quant"] <= 0.16
    assert shares["quant"] < shares["mix"] <= shares["origin"]


# -- budgets in bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, number_format, length, steps",
    [
        *((method, "int4", 500, 12) for method in PUBLISHED),
        *((method, "int4", 60, 45) for method in PUBLISHED),
        ("quant", "fp8", 60, 45),
        ("mix", "int2", 500, 12),
        ("quant", "int4", 6, 105),
        ("mix", "fp8", 6, 105),
    ],
)
def test_a_budget_in_bytes_holds_at_every_step(
    half: Any, method: str, number_format: str, length: int, steps: int
) -> None:
    size = 96
    config = CacheConfig.for_method(
        method, cache_size=size, budget_unit="bytes", window_size=W, quant_format=number_format
    )
    cache = TriStateCache(half, config)
    budget = size * 2 * 64 * 2 * 2 * 2
    ids = prompt(length + steps, seed=length)
    with attach(half):
        forward(half, cache, ids[:, :length])
        assert cache.nbytes() <= budget
        for _ in feed(half, cache, ids[:, length:]):
            assert cache.nbytes() <= budget
    # At the end there was more than enough to hold. Less than one slot of each kind may be left in every head.
    assert cache.nbytes() >= budget - 2 * 2 * (262 + FORMATS[number_format].bytes_per_token(64, 64) + METADATA)
    counts = cache.token_counts()
    if method in ("quant", "mix") and length == 500:
        assert counts["original"] + counts["quantized"] > 1.3 * size


def test_a_ratio_is_a_share_of_each_samples_full_bytes(half: Any) -> None:
    ids = prompt(1200, seed=6)
    full = DynamicCache(config=half.config)
    forward(half, full, ids)
    for method in PUBLISHED:
        cache = TriStateCache(half, CacheConfig.for_method(method, cache_ratio=0.25, budget_unit="bytes"))
        with attach(half):
            forward(half, cache, ids)
        assert 0.23 <= cache.nbytes() / stock_bytes(full) <= 0.25


# -- what a prefill holds ----------------------------------------------------------------------------------------------


def test_bytes_of_a_prefill_are_those_of_the_stock_cache(half: Any) -> None:
    ids = prompt(70, seed=1, batch=2)
    prefill, full = PrefillCache(half), DynamicCache(config=half.config)
    forward(half, full, ids)
    with attach(half):
        forward(half, prefill, ids)
    assert prefill.nbytes() == stock_bytes(full)
    assert prefill.full_bytes(70) == stock_bytes(full)
    forward(half, full, prompt(11, seed=2, batch=2))
    assert prefill.full_bytes(81) == stock_bytes(full)


def test_full_bytes_of_a_model_with_sliding_layers() -> None:
    model = gemma3(16)
    for length in (5, 15, 16, 17, 60):
        ids = prompt(length, seed=1)
        prefill, full = PrefillCache(model), DynamicCache(config=model.config)
        forward(model, full, ids)
        with attach(model):
            forward(model, prefill, ids)
        assert prefill.full_bytes(length) == stock_bytes(full)
        assert prefill.nbytes() == storage_bytes([(layer.keys, layer.values) for layer in full.layers])


# -- the walk itself ---------------------------------------------------------------------------------------------------


@dataclass
class Holder:
    item: Any
    other: Any = None


class Slotted:
    __slots__: ClassVar[tuple[str, ...]] = ("empty", "item")

    def __init__(self, item: Any) -> None:
        self.item = item


class SlottedChild(Slotted):
    __slots__ = "more"

    def __init__(self, item: Any, more: Any) -> None:
        super().__init__(item)
        self.more = more


Pair = collections.namedtuple("Pair", "left right")


def test_a_view_counts_as_the_storage_that_it_keeps_alive() -> None:
    whole = torch.zeros(1000)
    assert storage_bytes(whole[:10]) == 4000
    assert storage_bytes(whole[:10], whole[500:], whole.view(10, 100).T, whole) == 4000
    assert storage_bytes(whole.expand(7, 1000)) == 4000
    assert storage_bytes(torch.zeros(1).expand(10**6)) == 4
    assert storage_bytes(whole, whole.clone()) == 8000
    assert storage_bytes(torch.zeros(0), whole[:0]) == 4000


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: [t],
        lambda t: (t, [t]),
        lambda t: {"key": {"inner": t}},
        lambda t: Holder(Holder(t)),
        lambda t: Pair(t, 1),
        lambda t: Slotted(t),
        lambda t: SlottedChild(None, t),
        lambda t: {t},
        lambda t: frozenset([t]),
        lambda t: collections.OrderedDict(a=t),
        lambda t: collections.defaultdict(list, a=[t]),
        lambda t: collections.deque([t]),
        lambda t: torch.nn.Parameter(t),
        lambda t: collections.UserDict(a=t),
    ],
)
def test_tensors_are_found_in_any_container(wrap: Any) -> None:
    assert storage_bytes(wrap(torch.zeros(100))) == 400


def test_a_subclass_counts_what_it_holds_not_what_it_stands_for() -> None:
    one, other = torch.zeros(100), torch.zeros(100)
    assert storage_bytes(TwoTensor(one, other)) == 800
    assert storage_bytes([TwoTensor(one, other)], one) == 800


def test_circles_and_models_are_no_trouble() -> None:
    holder = Holder(torch.zeros(100))
    holder.other = [holder, {"again": holder}]
    assert storage_bytes(holder) == 400
    holder.other = torch.nn.Linear(1000, 1000)
    assert storage_bytes(holder) == 400, "a cache may point at its model"
    assert storage_bytes(None, 3, "text", [], {}) == 0


def test_many_short_lived_containers_are_all_counted() -> None:
    """Python gives an address to a new object as soon as the old one is gone."""

    class Fresh(collections.abc.Mapping):  # type: ignore[type-arg]
        def __init__(self, tensors: list[torch.Tensor]) -> None:
            self._get = lambda: tensors

        def __getitem__(self, key: int) -> list[torch.Tensor]:
            return [self._get()[key]]

        def __iter__(self) -> Any:
            return iter(range(len(self._get())))

        def __len__(self) -> int:
            return len(self._get())

    assert storage_bytes(Fresh([torch.zeros(10) for _ in range(50)])) == 2000
