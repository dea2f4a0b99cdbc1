"""The attention function that lets a model read a tri-state cache, registered with transformers under ``"arkv"``.

No forward of transformers is replaced: ``Cache.update`` hands the model a :class:`~arkv.cache.LayerHandle` in the place
of keys and values, the model passes it on untouched, and :func:`attention_forward` lets the layer attend to its own
storage. Stock caches keep working under the same function, which then is transformers' SDPA path.
"""

from __future__ import annotations

import weakref
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from arkv.config import ConfigError

NAME = "arkv"


class LazyMask:
    """The mask of one forward, made only as far as it is needed.

    Layers of a tri-state cache hold different numbers of tokens, so the one dense mask of a forward fits none of them
    while decoding; they need to know the padding at most.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        # A static cache counts its tokens in a tensor that it changes before the mask is made.
        self._arguments: dict[str, Any] = {
            name: value.clone() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
            for name, value in arguments.items()
        }

    @cached_property
    def dense(self) -> torch.Tensor | None:
        """What SDPA would get: bool [B, 1, T, N], or None where plain causal attention is meant."""
        mask: torch.Tensor | None = sdpa_mask(**self._arguments)
        return mask

    @cached_property
    def padding(self) -> torch.Tensor | None:
        """Bool [B, tokens seen and new], False where a token is padding; None without any padding.

        Raises:
            ConfigError: padding stands behind a token.
        """
        mask: torch.Tensor | None = self._arguments.get("attention_mask")
        if mask is None or bool(mask.all()):
            return None
        mask = mask.bool()
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ConfigError(
                "attention_mask has zeros behind ones: a compressed cache serves padding on the left only "
                "(tokenizer.padding_side = 'left'), before the first token of a sequence"
            )
        return mask


def attention_mask(**arguments: Any) -> LazyMask:
    """The mask function that belongs to :func:`attention_forward`."""
    return LazyMask(arguments)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a tri-state layer (``key`` is its handle) or over plain keys and values.

    Args:
        query: after RoPE, [B, Hq, T, D].
        key, value: what ``Cache.update`` returned.

    Returns:
        ``(output [B, T, Hq, D], None)``.
    """
    if kwargs.get("s_aux") is not None:
        raise ConfigError(f"{type(module).__name__} has learned attention sinks, which a compressed cache cannot serve")
    if isinstance(key, torch.Tensor):
        dense = attention_mask.dense if isinstance(attention_mask, LazyMask) else attention_mask
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, dense, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    if isinstance(attention_mask, torch.Tensor):
        # Made by the caller: the layers hold different tokens, none of which its columns stand for any more.
        raise ConfigError(
            f"attention_mask has {attention_mask.dim()} dimensions, which a compressed cache cannot serve: give a mask "
            "[batch, tokens] with zeros for padding on the left, or none"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return key.attend(module, query, attention_mask, scaling, **kwargs), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)


class _NoGradients(torch.autograd.Function):
    """Hands a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The same numbers."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        """Raises :class:`ConfigError`."""
        raise ConfigError(
            "no gradients through decoding steps of a compressed cache: what it stores is cut off from the graph; "
            "take them from a forward of all tokens, or decode under torch.no_grad()"
        )


def refuse_gradients(output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """``output``, so that a backward pass that gets to it fails: what it depends on is not all in its graph.

    Args:
        inputs: some of that, so that a backward pass which is to reach them comes by.
    """
    if not torch.is_grad_enabled():
        return output
    if not output.requires_grad:
        output.requires_grad_()
    refused: torch.Tensor = _NoGradients.apply(output, *inputs)  # type: ignore[no-untyped-call]
    return refused


class _Own:
    """The attention that a config has without this library, and how often it is attached."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = weakref.ref(config)
        self.implementation = config._attn_implementation
        self.times = 0

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Own:
        """What is known of ``config``, or else what it says now."""
        own = _attached.get(id(config))
        # Whatever has been set by hand since then is the model's own.
        if own is None or own.config() is not config or config._attn_implementation != NAME:
            own = _attached[id(config)] = cls(config)
        return own

    def detach(self) -> None:
        """Put it back when nobody else is attached any more."""
        config = self.config()
        self.times -= 1
        if self.times == 0 and config is not None and _attached.get(id(config)) is self:
            del _attached[id(config)]
            config._attn_implementation = self.implementation


_attached: dict[int, _Own] = {}
"""By the identity of the config, since different configs can be equal."""


class attach:
    """Let ``model`` attend through this library; as a context manager, put its own attention back at the end.

    Several may be on at a time and end in any order: the last one puts the model's own attention back.

    >>> with attach(model):                                                     # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=TriStateCache(model, config))
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Parts of a composite model have configs, and maybe attention functions, of their own.
        configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
        self._parts = [_Own.of(config) for config in configs.values()]
        model.set_attn_implementation(NAME)
        for own in self._parts:
            own.times += 1

    def detach(self) -> None:
        """Put the model's own attention back, unless it is still attached by another; once is enough."""
        parts, self._parts = self._parts, []
        for own in parts:
            own.detach()

    def __enter__(self) -> attach:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.detach()
        return False
