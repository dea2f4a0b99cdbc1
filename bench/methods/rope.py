"""Rotary factors that depend on how long a text is (LongRoPE, dynamic NTK).

transformers chooses them anew in every forward, by the largest position in it, so that a chunk of a prompt, or a short
row beside a long one, would be turned by other factors than those of its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
