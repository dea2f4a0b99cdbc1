"""What a caller can get wrong, each said in one line that names what would work."""

from __future__ import annotations

from typing import Any

import torch

from arkv.config import CacheConfig, ConfigError


def check_model(model: Any) -> None:
    """Raises :class:`ConfigError` for what is neither a model of transformers nor the config of one."""
    if not hasattr(getattr(model, "config", model), "get_text_config"):
        raise ConfigError(
            f"model is {_said(model)}: give a model of transformers, as AutoModelForCausalLM.from_pretrained makes it"
        )


def check_attachable(model: Any) -> None:
    """Raises :class:`ConfigError` for what has no attention to be set."""
    check_model(model)
    if not hasattr(model, "set_attn_implementation"):
        raise ConfigError(f"model is {_said(model)}: give the model itself, whose attention is to be set")


def check_config(config: Any) -> None:
    """Raises :class:`ConfigError` for what are no settings of a cache."""
    if not isinstance(config, CacheConfig):
        raise ConfigError(
            f"config is {_said(config)}: give a CacheConfig, such as CacheConfig.for_method('mix', cache_size=512)"
        )


def check_samples(wanted: list[int], samples: int) -> None:
    """Raises :class:`ValueError` for a sample that a cache does not hold."""
    for sample in wanted:
        if not 0 <= sample < samples:
            there = f"the cache holds {samples}, numbered from 0" if samples else "the cache has read no prompt yet"
            raise ValueError(f"sample {sample}: {there}")


def check_ids(ids: Any) -> None:
    """Raises :class:`ConfigError` for what are no token ids [B, N]."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        shape = f"a tensor {list(ids.shape)}" if isinstance(ids, torch.Tensor) else _said(ids)
        raise ConfigError(f"ids is {shape}: give token ids [batch, tokens], such as inputs['input_ids']")


def _said(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
