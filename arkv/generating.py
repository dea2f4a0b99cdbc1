"""``generate`` with a cache of this library, which stays where a model would drop it for a full one."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from arkv.config import ConfigError
from arkv.watched import WatchedCache

_NAME = "prepare_inputs_for_generation"
_times: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
"""How often a model is watched."""


def watch(model: PreTrainedModel) -> None:
    """Until :func:`unwatch`, ``model.generate`` keeps the compressed cache that it was given where it would drop it and
    read the whole text into a full one, as models with LongRoPE do where a text grows beyond their original length: the
    text is read anew into that cache, as a prompt is, and compressed anew."""
    prepare = getattr(model, _NAME, None)
    if prepare is None:
        return
    _times[model] = _times.get(model, 0) + 1
    if _times[model] > 1:
        return

    @functools.wraps(prepare)
    def checked(input_ids: Any, *arguments: Any, **named: Any) -> Any:
        given = named.get("past_key_values")
        if isinstance(given, WatchedCache):
            _check_new(input_ids, given, named)
        prepared = prepare(input_ids, *arguments, **named)
        if isinstance(given, WatchedCache) and prepared.get("past_key_values") is not given:
            given.reset()
            if named.get("cache_position") is not None:
                # Of the whole text, which some versions would cut to its newest token.
                named["cache_position"] = torch.arange(input_ids.shape[1], device=input_ids.device)
                prepared = prepare(input_ids, *arguments, **named)
            prepared["past_key_values"] = given
        return prepared

    setattr(model, _NAME, checked)


def _check_new(input_ids: torch.Tensor, cache: WatchedCache, named: dict[str, Any]) -> None:
    """Raises :class:`ConfigError` where ``generate`` begins, and the cache has read all that it is given, or more."""
    seen = cache.get_seq_length()
    begins = named.get("is_first_iteration") and named.get("inputs_embeds") is None
    if begins and seen and input_ids.shape[1] <= seen:
        raise ConfigError(
            f"the cache has read {seen} tokens already, and generate is given {input_ids.shape[1]} in all: make a "
            "cache for each prompt, or reset() it; to go on, give what it has read with the new text behind it"
        )


def unwatch(model: PreTrainedModel) -> None:
    """As before, unless it is watched for somebody else."""
    if model not in _times:
        return
    _times[model] -= 1
    if not _times[model]:
        del _times[model]
        delattr(model, _NAME)
