"""A model that was loaded by somebody else, with what a run needs to know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.models.loading import LoadedModel


def given(model: Any, tokenizer: Any) -> LoadedModel:
    """A transformers model and its tokenizer as :func:`bench.models.loading.load` would have returned them.

    Raises:
        UserError: they are something else, or the weights are not there.
    """
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        kinds = f"{type(model).__name__}, {type(tokenizer).__name__}"
        raise UserError(f"({kinds}): give a transformers model and its tokenizer, in this order", exit_code=2)
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UserError("the model has weights that are not loaded (device meta)", exit_code=2)
    origin = str(model.config.name_or_path or type(model).__name__)
    with torch.no_grad():
        fingerprint = _fingerprint(model, tokenizer)
    return LoadedModel(
        config=model.config,
        tokenizer=tokenizer,
        name=Path(origin).name,
        source=f"given as an object, of {origin}",
        reference=origin,
        folder=Path(origin),
        revision=None,
        fingerprint=fingerprint,
        context_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        is_chat=bool(tokenizer.chat_template),
        model=model,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """SHA-256 over config, generation config, tokenizer and every weight as they are now, whatever file they are of."""
    import torch

    generation = model.generation_config.to_dict() if model.generation_config is not None else {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for name in ("padding", "truncation") if backend is not None else ():
        # As its newest call has left them.
        known.pop(name, None)
    parts = {
        "config": model.config.to_dict(),
        "generation_config": generation,
        "tokenizer": known,
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
    }
    for written in (parts["config"], generation):
        for name in ("transformers_version", "_name_or_path"):
            written.pop(name, None)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the one that it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
