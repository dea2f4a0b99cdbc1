"""Where a model has its attention."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from bench.errors import UserError


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention module of every layer. What it returns first is its output [B, T, hidden size].

    Raises:
        UserError: a layer of the model has none, or it stands elsewhere.
    """
    try:
        decoder = getattr(model.model, "language_model", model.model)
        return [layer.self_attn for layer in decoder.layers]
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} has no attention in every model.layers[i].self_attn: {error}"
        ) from None
