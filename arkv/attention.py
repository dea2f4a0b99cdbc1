"""The attention function that lets a model read a tri-state cache, registered with transformers under ``"arkv"``.

No forward of transformers is replaced: ``Cache.update`` hands the model a :class:`~arkv.cache.LayerHandle` in the place
of keys and values, the model passes it on untouched, and :func:`attention_forward` lets the layer attend to its own
storage. Stock caches keep working under the same function, which then is transformers' SDPA path.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from arkv.blocks import plain_attention
from arkv.config import ConfigError, NotCompressible
from arkv.generating import unwatch, watch
from arkv.misuse import check_attachable

NAME = "arkv"


class NotAttached(ConfigError, AttributeError):
    """A model that is not attached used something that only this library's attention function can read."""


class UsedItself(NotCompressible, AttributeError):
    """A model that is attached did, in an attention of its own."""


def _misused(config: Any, what: str) -> ConfigError:
    """The error where a model of ``config`` works on ``what`` itself."""
    if getattr(config, "_attn_implementation", None) == NAME:
        return UsedItself(
            f"model {config.model_type!r} works on {what} itself: its own attention does not go through "
            "transformers' attention interface, so that no compressed cache serves it; a full cache does"
        )
    return NotAttached(
        "the model's own attention cannot read this cache: put `with attach(model):` (from arkv) around the model's "
        "call"
    )


class Handle(ABC):
    """What a model receives in the place of keys and values, to pass it on to the attention function."""

    config: Any = None
    """Of the model, where it is known."""

    sliding_window: int | None = None
    """Where the layer has one."""

    def __getattr__(self, name: str) -> Any:
        raise _misused(self.config, "the keys and values of its cache")

    @abstractmethod
    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of ``query`` [B, Hq, T, D]."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handles = (item for item in tree_leaves((args, kwargs)) if isinstance(item, Handle))
        raise _misused(next(handles).config, "the keys and values of its cache")


class LazyMask:
    """The mask of one forward, made only as far as it is needed.

    Layers of a tri-state cache hold different numbers of tokens, so the one dense mask of a forward fits none of them
    while decoding; they need to know the padding at most.
    """

    ndim = 4
    """Where a cache is compileable, ``generate`` makes a step's mask beforehand and hands it on as one of these."""

    def contiguous(self) -> LazyMask:
        """Itself."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise _misused(self.__dict__.get("_arguments", {}).get("config"), "its attention mask")

    def __getitem__(self, index: Any) -> Any:
        raise _misused(self._arguments.get("config"), "its attention mask")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = (item for item in tree_leaves((args, kwargs)) if isinstance(item, LazyMask))
        raise _misused(next(masks)._arguments.get("config"), "its attention mask")

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


def dense_of(mask: Any) -> torch.Tensor | None:
    """What SDPA would get in the place of ``mask``."""
    return mask.dense if isinstance(mask, LazyMask) else mask


def padding_of(mask: Any, new: int) -> torch.Tensor | None:
    """Bool [B, ``new``], False where a new token is padding; None without any."""
    padding = mask.padding if isinstance(mask, LazyMask) else None
    return None if padding is None else padding[:, -new:]


def attention_mask(**arguments: Any) -> LazyMask:
    """The mask function that belongs to :func:`attention_forward`."""
    mask = arguments.get("attention_mask")
    return mask if isinstance(mask, LazyMask) else LazyMask(arguments)


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
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(key, torch.Tensor):
        dense = dense_of(attention_mask)
        return plain_attention(module, query, key, value, dense, scaling, dropout=dropout, **kwargs), None
    _check_understood(module, key, dropout, kwargs)
    if isinstance(attention_mask, torch.Tensor):
        # Made by the caller: the layers hold different tokens, none of which its columns stand for any more.
        raise ConfigError(
            f"attention_mask has {attention_mask.dim()} dimensions, which a compressed cache cannot serve: give a mask "
            "[batch, tokens] with zeros for padding on the left, or none"
        )
    return key.attend(module, query, attention_mask, scaling, **kwargs), None


_UNDERSTOOD = {"softcap", "s_aux"}
_HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "is_causal",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "seq_idx",
    "sliding_window",
    "token_type_ids",
    "use_cache",
}
"""What transformers' models hand to the attention function without a change of what it is to compute."""


def _check_understood(module: torch.nn.Module, handle: Handle, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raises :class:`NotCompressible` where a layer asks for attention that a compressed cache does not compute."""
    config = handle.config or getattr(module, "config", None)
    name = f"model {getattr(config, 'model_type', None)!r}"
    strange = [key for key, item in kwargs.items() if item is not None and key not in _UNDERSTOOD | _HARMLESS]
    if strange:
        raise NotCompressible(f"{name} hands {min(strange)!r} to its attention, which a compressed cache does not know")
    window, context = kwargs.get("sliding_window"), getattr(config, "max_position_embeddings", None)
    if window is not None and handle.sliding_window is None and not (context is not None and window >= context):
        raise NotCompressible(
            f"{name} has a sliding window of {window} in a layer that its config counts as a full one"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotCompressible(f"{name} has attention that is not causal, which a compressed cache cannot serve")
    if dropout:
        raise ConfigError(f"{name} drops attention out, which a compressed cache cannot do: call model.eval()")


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


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without transformers' warnings of models that have no attention interface, which errors of ours tell."""
    logger = logging.getLogger("transformers.modeling_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class attach:
    """Let ``model`` attend through this library; as a context manager, put its own attention back at the end.

    Several may be on at a time and end in any order: the last one puts the model's own attention back.

    >>> with attach(model):                                                     # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=TriStateCache(model, config))
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_attachable(model)
        self.model = model
        self._watched = False
        # Parts of a composite model have configs, and maybe attention functions, of their own.
        configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
        self._parts = [_Own.of(config) for config in configs.values()]
        for own in self._parts:
            own.times += 1
        with contextlib.suppress(ValueError), _unwarned():
            model.set_attn_implementation(NAME)
        # Where the model has no attention interface transformers says no, or only warns.
        decoder: Any = model.config.get_text_config(decoder=True)
        if decoder._attn_implementation != NAME:
            self.detach()
            raise NotCompressible(
                f"model {decoder.model_type!r} has no attention interface that a compressed cache could use; "
                "transformers' own full cache serves it, without `attach`"
            )
        watch(model)
        self._watched = True

    def detach(self) -> None:
        """Put the model's own attention back, unless it is still attached by another; once is enough."""
        parts, self._parts = self._parts, []
        for own in parts:
            own.detach()
        if self._watched:
            self._watched = False
            unwatch(self.model)

    def __enter__(self) -> attach:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.detach()
        return False
