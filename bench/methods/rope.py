"""Rotary factors that depend on how long a text is (LongRoPE, dynamic NTK).

transformers chooses them anew in every forward, by the largest position in it, so that a chunk of a prompt, or a short
row beside a long one, would be turned by other factors than those of its text. Where an answer grows beyond the length
at which they change, ``generate`` drops the cache of some models and reads the text anew (:func:`rereads_beyond`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicCache


def _changing(model: Any) -> list[torch.nn.Module]:
    """The modules whose factors depend on the length."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in named):
            found.append(module)
    return found


def depends_on_length(model: Any) -> bool:
    """Whether the model's rotary factors do. Then texts are read one by one."""
    return bool(_changing(model))


@torch.no_grad()
def rereads_beyond(model: Any) -> int | None:
    """Tokens of a text beyond which ``generate`` drops its cache and reads all of it anew, with the factors of a longer
    text; None for a model that it never does that with, whatever its factors."""
    length = getattr(model.config.get_text_config(decoder=True), "original_max_position_embeddings", None)
    if length is None or not depends_on_length(model):
        return None
    # The model itself is asked: what it makes of a cache that has grown to that length.
    cache = DynamicCache()
    held = torch.zeros((1, 1, length, 1), device=model.device)
    cache.update(held, held, 0)
    ids = torch.zeros((1, length + 1), dtype=torch.long, device=model.device)
    prepared = model.prepare_inputs_for_generation(
        ids,
        past_key_values=cache,
        attention_mask=torch.ones_like(ids),
        cache_position=torch.tensor([length], device=model.device),
        use_cache=True,
    )
    return None if prepared.get("past_key_values") is cache else length


@contextmanager
def factors_for(model: Any, length: int) -> Iterator[None]:
    """Under this, the model's rotary factors are those of a text of ``length`` tokens, or of a longer forward."""

    def lengthened(_module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        places = options["position_ids"] if "position_ids" in options else inputs[1]
        # One more position, which the choice of factors looks at and `shortened` takes away.
        end = places.new_full((places.shape[0], 1), length - 1)
        places = torch.cat([places, end], dim=1)
        if "position_ids" in options:
            return inputs, {**options, "position_ids": places}
        return (inputs[0], places, *inputs[2:]), options

    def shortened(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(item[:, :-1] for item in output)

    hooks: list[Any] = []
    for module in _changing(model):
        hooks.append(module.register_forward_pre_hook(lengthened, with_kwargs=True))
        hooks.append(module.register_forward_hook(shortened))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
