"""ARKV: a tri-state KV cache for transformers models. Each token is Original, Quantized or Evicted."""

from arkv.attention import attach
from arkv.batch import CacheBatch
from arkv.cache import TriStateCache, compress
from arkv.config import METHODS, CacheConfig, ConfigError
from arkv.formats import FORMATS
from arkv.memory import storage_bytes
from arkv.prefill import PrefillCache
from arkv.rereading import replay

__all__ = [
    "FORMATS",
    "METHODS",
    "CacheBatch",
    "CacheConfig",
    "ConfigError",
    "PrefillCache",
    "TriStateCache",
    "attach",
    "compress",
    "replay",
    "storage_bytes",
]
