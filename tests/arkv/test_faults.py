"""What once went wrong in silence, or failed without a word about why."""

from __future__ import annotations

from typing import Any

import pytest

from arkv import CacheConfig, TriStateCache, attach
from tests.arkv.conftest import feed, forward, held_sets, prompt

# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, length", [(0.5, 150), (1.0, 1), (1.0, 20)])
@pytest.mark.parametrize("method", ["origin", "quant"])
def test_sinks_stay_whatever_the_running_average_forgets(llama: Any, method: str, rate: float, length: int) -> None:
    settings = {"cache_size": 32, "window_size": 8, "n_sink": 4, "decode_importance": "mean", "decode_rate": rate}
    cache = TriStateCache(llama, CacheConfig.for_method(method, **settings))
    with attach(llama):
        forward(llama, cache, prompt(40, seed=1))
        forward(llama, cache, prompt(length, seed=2))
        for logits in feed(llama, cache, prompt(30, seed=3)):
            assert logits.isfinite().all()
    for layer in cache.layers:
        for original, quantized in held_sets(layer):
            assert original >= {0, 1, 2, 3}
            assert len(original | quantized) == 32
