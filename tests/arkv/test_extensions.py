"""A scorer, a format and an allocator of one's own, as CONTRIBUTING.md shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import arkv
from arkv import FORMATS, CacheConfig, ConfigError, TriStateCache, attach
from arkv.formats import Layout
from arkv.scores import SCORERS, Prompt
from tests.arkv.conftest import Driver, compressed, forward, prompt

EXAMPLES = re.findall(r"```python\n(.*?)```", Path("CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """As they were, afterwards."""
    scorers, formats = dict(SCORERS), dict(FORMATS)
    for example in EXAMPLES:
        exec(example, {})
    yield
    for registry, before in ((SCORERS, scorers), (FORMATS, formats)):
        registry.clear()  # type: ignore[attr-defined]
        registry.update(before)  # type: ignore[attr-defined]


def test_the_scorer_keeps_what_it_says(llama: Any) -> None:
    config = CacheConfig(cache_size=24, window_size=8, original_share=1.0, importance="key_norm", pool_width=1)
    driver = Driver(config)
    query, key, value = driver.random(60, seed=1)
    driver.feed(query, key, value)
    states = driver.layer().states()
    for head in range(2):
        shortest = key[0, head, :52].norm(dim=-1).argsort()[:16]
        assert set(states.position[head].tolist()) == {*shortest.tolist(), *range(52, 60)}
    fused, cache = compressed(llama, prompt(60, seed=1), config, 10)
    assert fused.logits.isfinite().all()
    assert cache.token_counts()["original"] == 24


def test_the_format_is_read_by_all_kernels(wide_llama: Any) -> None:
    logits = []
    for attention in ("fused", "reconstruct"):
        config = CacheConfig.for_method("quant", cache_size=48, window_size=8, quant_format="nf4", attention=attention)
        decoded, cache = compressed(wide_llama, prompt(80, seed=1), config, 20)
        assert cache.token_counts()["quantized"] == 40
        logits.append(decoded.logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-3


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda prompt: torch.full(prompt.key.shape[:3], float("nan")), "negative or NaN"),
        (lambda prompt: -torch.ones(prompt.key.shape[:3]), "negative or NaN"),
        (lambda prompt: torch.ones(prompt.key.shape[:2]), "shape"),
    ],
)
def test_a_scorer_that_gives_nonsense_is_named(llama: Any, made: Any, message: str) -> None:
    class Broken:
        moments = False
        settings = ()

        def queries(self, config: CacheConfig) -> int:
            return config.window_size

        def __call__(self, prompt: Prompt, config: CacheConfig) -> torch.Tensor:
            return made(prompt)

    SCORERS["broken"] = Broken()
    cache = TriStateCache(llama, CacheConfig(cache_size=24, window_size=8, importance="broken"))
    with attach(llama), pytest.raises(ConfigError, match=f"importance='broken': .*{message}"):
        forward(llama, cache, prompt(40, seed=1))


def test_an_unknown_scorer_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'key_norm'"):
        CacheConfig(cache_size=64, importance="key_norms")


@pytest.mark.parametrize(
    "bits, levels, message",
    [
        (4, tuple(range(17)), "never more than 16"),
        (8, (0.0, 1.0), "at most 16"),
        (2, (0.0, 1.0, 3.0, 2.0), "ascend"),
        (2, (1.0, 2.0, 3.0, 4.0), "from 0.0 on"),
        (5, tuple(range(32)), "2, 3, 4 or 8 bits"),
    ],
)
def test_levels_that_no_kernel_could_read_are_refused(bits: int, levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(bits, levels)


def test_one_call_gives_a_cache_that_the_model_can_read(llama: Any) -> None:
    config = CacheConfig.for_method("mix", cache_size=24, window_size=8)
    ids, before = prompt(40, seed=1), llama.config._attn_implementation
    with arkv.compress(llama, config) as cache:
        output = llama.generate(ids, past_key_values=cache, max_new_tokens=5)
    assert llama.config._attn_implementation == before
    expected, _ = compressed(llama, ids, config, 5)
    assert torch.equal(output, expected.tokens)
