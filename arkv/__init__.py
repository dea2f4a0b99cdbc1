"""ARKV: a tri-state KV cache for transformers models. Each token is Original, Quantized or Evicted."""

from arkv.attention import attach
from arkv.batch import CacheBatch
from arkv.cache import PrefillCache, TriStateCache
from arkv.config import METHODS, CacheConfig, ConfigError
from arkv.memory import storage_bytes
from arkv.quantization import FORMATS

__all__ = [
    "FORMATS",
    "METHODS",
    "CacheBatch",
    "CacheConfig",
    "ConfigError",
    "PrefillCache",
    "TriStateCache",
    "attach",
    "storage_bytes",
]
