"""Tiny random models and the few tools that the tests of the cache share.

The weights are drawn wide enough that attention is far from uniform: otherwise no choice of tokens would matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from arkv import CacheConfig, TriStateCache, attach
from arkv.attention import attention_forward
from arkv.store import COUNT, START, column

VOCABULARY = 97
PUBLISHED = ("window", "origin", "quant", "mix")

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spread(model: Any, seed: int = 0, deviation: float = 0.15) -> Any:
    """The model with wide random weights in evaluation mode; generation is greedy and never stops by itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else deviation * noise)
    model.generation_config.update(
        do_sample=False, eos_token_id=None, pad_token_id=0, temperature=None, top_p=None, top_k=None
    )
    return model.eval()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return spread(LlamaForCausalLM(LlamaConfig(**SHAPE)), seed=1)


@pytest.fixture(scope="session")
def qwen3() -> Qwen3ForCausalLM:
    return spread(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), seed=2)


@pytest.fixture(scope="session")
def wide_llama() -> LlamaForCausalLM:
    """Head dim 64, as real models have it: formats of less than 8 bits need groups of 32 channels."""
    return spread(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "head_dim": 64})), seed=3, deviation=0.1)


def gemma3(sliding_window: int) -> Gemma3ForCausalLM:
    """A full layer between two sliding ones."""
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return spread(Gemma3ForCausalLM(Gemma3TextConfig(**{**SHAPE, **layers}, sliding_window=sliding_window)), seed=4)


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    """Both families, one after the other."""
    return request.getfixturevalue(request.param)


MODELS_AND_METHODS = [*(("llama", method) for method in PUBLISHED), ("qwen3", "mix")]
"""For ``parametrize("model, method", ..., indirect=["model"])``: all methods, and the second family once."""


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Random token ids [batch, length]; 0 is left to padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [1, n] of different lengths as one batch: ids and attention mask [B, longest]."""
    longest = max(item.shape[1] for item in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, item in enumerate(prompts):
        ids[row, longest - item.shape[1] :] = item[0]
        mask[row, longest - item.shape[1] :] = 1
    return ids, mask


class Decoded:
    """Tokens [B, prompt + new] and logits [B, new, vocabulary] of a generation."""

    def __init__(self, output: Any) -> None:
        self.tokens: torch.Tensor = output.sequences
        self.logits: torch.Tensor = torch.stack(output.logits, dim=1)


def decode(model: Any, ids: torch.Tensor, cache: Any, new: int, mask: torch.Tensor | None = None, **kw: Any) -> Decoded:
    """Greedy generation of exactly ``new`` tokens through ``cache``."""
    mask = torch.ones_like(ids) if mask is None else mask
    kw = {"max_new_tokens": new, "output_logits": True, "return_dict_in_generate": True, **kw}
    return Decoded(model.generate(ids, attention_mask=mask, past_key_values=cache, **kw))


def stock(model: Any, ids: torch.Tensor, new: int, mask: torch.Tensor | None = None, **kw: Any) -> Decoded:
    """The same with the model's own attention and transformers' full cache."""
    return decode(model, ids, DynamicCache(config=model.config), new, mask, **kw)


def compressed(
    model: Any, ids: torch.Tensor, config: CacheConfig, new: int, mask: torch.Tensor | None = None, **kw: Any
) -> tuple[Decoded, TriStateCache]:
    """The same through a new tri-state cache, which is returned too."""
    cache = TriStateCache(model, config)
    with attach(model):
        return decode(model, ids, cache, new, mask, **kw), cache


@torch.no_grad()
def forward(model: Any, cache: Any, ids: torch.Tensor, **kw: Any) -> torch.Tensor:
    """Logits [B, T, vocabulary] of one forward through ``cache``."""
    return model(ids, past_key_values=cache, use_cache=True, **kw).logits


def feed(model: Any, cache: Any, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Teacher forcing, one token per forward: yields the logits [B, 1, vocabulary] after each."""
    for step in range(ids.shape[1]):
        yield forward(model, cache, ids[:, step : step + 1])


def held_sets(layer: Any, sample: int = 0, shift: int = 0) -> list[tuple[set[int], set[int]]]:
    """Per KV head the positions that are Original and those that are Quantized, less ``shift`` padding tokens."""
    states = layer.states(sample)
    pairs = []
    for positions, quantized in zip(states.position.tolist(), states.quantized.tolist(), strict=True):
        low = {place - shift for place, flag in zip(positions, quantized, strict=True) if flag and place >= 0}
        high = {place - shift for place, flag in zip(positions, quantized, strict=True) if not flag and place >= 0}
        assert not low & high
        taken = [place for place in positions if place >= 0]
        assert len(taken) == len(set(taken)), "a position is held twice"
        pairs.append((high, low))
    return pairs


class Driver:
    """Feeds queries, keys and values into the layers of a cache, as a model would, without the model."""

    def __init__(self, config: CacheConfig, layers: int = 1, heads: int = 2, groups: int = 2, dim: int = 16) -> None:
        self.heads, self.groups, self.dim, self.layers = heads, groups, dim, layers
        model_config = LlamaConfig(
            **{
                **SHAPE,
                "num_hidden_layers": layers,
                "num_attention_heads": heads * groups,
                "num_key_value_heads": heads,
                "hidden_size": heads * groups * dim,
                "head_dim": dim,
            }
        )
        self.scaling = dim**-0.5
        self.cache = TriStateCache(model_config, config)

    def random(self, tokens: int, seed: int, batch: int = 1, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
        """Queries [B, Hq, T, D], keys and values [B, H, T, D]; the queries are wide, so that attention is peaked."""
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(batch, self.heads * self.groups, tokens, self.dim, generator=generator) * 2.0 * scale
        key = torch.randn(batch, self.heads, tokens, self.dim, generator=generator)
        value = torch.randn(batch, self.heads, tokens, self.dim, generator=generator)
        return query, key, value

    def feed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of one layer for one forward."""
        module: Any = SimpleNamespace(
            layer_idx=layer, num_key_value_groups=self.groups, is_causal=True, training=False, config=None
        )
        keys, values = self.cache.update(key, value, layer)
        output, weights = attention_forward(module, query, keys, values, None, scaling=self.scaling)
        assert weights is None
        return output

    def layer(self, index: int = 0) -> Any:
        return self.cache.layers[index]


def stored_token(layer: Any, place: int, head: int, sample: int = 0) -> list[torch.Tensor]:
    """What the Quantized pool stores of the token at position ``place``: codes, scales and zero points."""
    store, row = layer.store, layer.index * layer.store.layer_rows + sample * layer.heads + head
    pool = store.pools[1]
    start, count = (int(store.rows[row, column(1, which)]) for which in (START, COUNT))
    slots = torch.arange(start, start + count)
    (slot,) = slots[pool.position[slots] == place].tolist()
    tensors = [item for plane in (pool.key, pool.value) for item in plane[:3] if item is not None]
    return [tensor[slot] for tensor in tensors]


def quantized_bytes(layer: Any, place: int, head: int, sample: int = 0) -> list[bytes]:
    """The same, as bytes."""
    tokens = stored_token(layer, place, head, sample)
    return [item.reshape(-1).view(torch.uint8).numpy().tobytes() for item in tokens]


def table_bytes(pools: int) -> int:
    """Of a row's entry in the row table: tokens seen, padding, and three numbers of each pool, of 8 bytes each."""
    return 8 * (2 + 3 * pools)
