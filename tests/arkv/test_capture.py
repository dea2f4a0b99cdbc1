"""A step in steady state can be captured: fixed shapes, no look at what the device has computed, few operator calls.

No GPU is needed: tensors on a fake one have no numbers, so that anything which would have to know them fails.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from arkv import CacheConfig, TriStateCache, attach
from arkv.allocators import GivenCounts
from tests.arkv.conftest import PUBLISHED, Driver, compressed, feed, forward, prompt

LAYERS = 6


class Calls(TorchDispatchMode):
    """Notes operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def fake(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without numbers on a device that is not there."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


CASES = [
    *((method, {}) for method in PUBLISHED),
    ("mix", {"budget_unit": "bytes", "quant_format": "k4v3", "cache_size": 36}),
]


@pytest.mark.parametrize("method, settings", CASES, ids=str)
def test_a_step_runs_without_numbers(method: str, settings: dict[str, Any]) -> None:
    """All that the cache does between the model's own operations; indexing by brackets would need a real device."""
    config = CacheConfig.for_method(method, **{"cache_size": 24, "window_size": 8, **settings})
    driver = Driver(config, layers=LAYERS)
    for length in (200, 1, 1):
        for layer in range(LAYERS):
            driver.feed(*driver.random(length, seed=layer), layer=layer)
    assert driver.cache.is_compileable
    query, key, value = driver.random(1, seed=1)
    # What the cache knows of its keys and values is of another device, too.
    driver.cache._held_as.clear()
    by_layer = []
    with FakeTensorMode():
        for group in driver.cache._groups:
            store = group.store
            store.rows, store.pools, store._tensors = fake(store.rows), [pool.map(fake) for pool in store.pools], None
        query, key, value = fake(query), fake(key), fake(value)
        for layer in range(LAYERS):
            with Calls() as calls:
                output = driver.feed(query, key, value, layer=layer)
            by_layer.append(len(calls.names))
    assert output.shape == (1, 1, 4, 16)
    assert output.device.type == "cuda"
    assert driver.cache.get_seq_length() == 203
    # One layer beside what is done before the first and after the last one.
    assert by_layer[1] <= 4
    assert sum(by_layer) - by_layer[1] * LAYERS <= 40


def test_room_that_will_run_out_is_no_steady_state(llama: Any) -> None:
    cache = TriStateCache(llama, CacheConfig.for_method("mix", cache_size=64, window_size=8))
    assert not cache.is_compileable
    with attach(llama):
        forward(llama, cache, prompt(30, seed=1))
        assert not cache.is_compileable
        list(feed(llama, cache, prompt(40, seed=2)))
    assert cache.is_compileable


def test_counts_that_are_not_filled_yet_are_no_steady_state(llama: Any) -> None:
    """Their rows get slots as they need them."""
    config = CacheConfig(cache_size=64, window_size=8, original_share=0.5)
    counts = [torch.full((1, 2), 200), torch.full((1, 2), 200)]
    cache = TriStateCache(llama, config, allocator=GivenCounts(config, counts, [item // 4 for item in counts]))
    with attach(llama):
        forward(llama, cache, prompt(30, seed=1))
        assert not cache.is_compileable
        list(feed(llama, cache, prompt(200, seed=2)))
    assert cache.is_compileable


@pytest.mark.parametrize("method", [pytest.param("origin", marks=pytest.mark.slow), "mix"])
def test_a_compiled_model_gives_the_same_tokens(llama: Any, method: str) -> None:
    backend = os.environ.get("ARKV_TEST_BACKEND", "eager")
    config = CacheConfig.for_method(method, cache_size=32, window_size=8)
    ids, more = prompt(40, seed=1), prompt(6, seed=2)
    expected, cache = TriStateCache(llama, config), TriStateCache(llama, config)
    model = copy.deepcopy(llama)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    with attach(llama), attach(model), torch.no_grad():
        for part in (ids, *more.split(1, dim=1)):
            logits = llama(part, past_key_values=expected).logits
            got = compiled(part, past_key_values=cache).logits
            assert torch.equal(got.argmax(dim=-1), logits.argmax(dim=-1))
            assert (got - logits).abs().max() < 1e-4
    for one, other in zip(cache.layers, expected.layers, strict=True):
        assert one.states().position.equal(other.states().position)


@pytest.mark.slow
def test_by_inductor_too() -> None:
    """In a process of its own, whose compiling leaves threads and another limit of recursion behind."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "compiled_model"]
    environment = {**os.environ, "ARKV_TEST_BACKEND": "inductor"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout


def test_generate_goes_on_in_a_steady_state(llama: Any) -> None:
    """``generate`` makes masks beforehand for a cache that is compileable."""
    config = CacheConfig.for_method("mix", cache_size=24, window_size=8)
    once, cache = compressed(llama, prompt(60, seed=1), config, 20)
    assert cache.is_compileable
    with attach(llama):
        more = llama.generate(once.tokens, past_key_values=cache, max_new_tokens=5)
    again, _ = compressed(llama, prompt(60, seed=1), config, 25)
    assert torch.equal(more, again.tokens)
