"""``generate`` with a cache of this library: where a model drops it on the way, that is an error and no silence."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from transformers import PreTrainedModel

from arkv.config import ConfigError
from arkv.watched import WatchedCache

_NAME = "prepare_inputs_for_generation"
_times: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
"""How often a model is watched."""


def watch(model: PreTrainedModel) -> None:
    """Until :func:`unwatch`, ``model.generate`` raises :class:`ConfigError` where it would go on without the
    compressed cache that it was given, as models with LongRoPE do where a text grows beyond their original length."""
    prepare = getattr(model, _NAME, None)
    if prepare is None:
        return
    _times[model] = _times.get(model, 0) + 1
    if _times[model] > 1:
        return

    @functools.wraps(prepare)
    def checked(input_ids: Any, *arguments: Any, **named: Any) -> Any:
        prepared = prepare(input_ids, *arguments, **named)
        given = named.get("past_key_values")
        if isinstance(given, WatchedCache) and prepared.get("past_key_values") is not given:
            if given.get_seq_length():
                raise ConfigError(
                    f"model {model.config.model_type!r} drops its cache where a text grows to {input_ids.shape[1]} "
                    "tokens, and `generate` would go on with a full one: keep prompt and answer together below that "
                    "(max_new_tokens), or give a prompt of that length or more"
                )
            # A prompt that is longer: nothing has been read with the factors of a shorter text.
            prepared["past_key_values"] = given
        return prepared

    setattr(model, _NAME, checked)


def unwatch(model: PreTrainedModel) -> None:
    """As before, unless it is watched for somebody else."""
    if model not in _times:
        return
    _times[model] -= 1
    if not _times[model]:
        del _times[model]
        delattr(model, _NAME)
