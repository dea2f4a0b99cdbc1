"""Number formats of Quantized tokens, one file per kind; :mod:`arkv.formats.base` says what a format is."""

from arkv.formats.base import Codes, Format, Layout, uniform_levels
from arkv.formats.fp8 import FP8
from arkv.formats.int8 import INT8
from arkv.formats.uniform import INT2, INT4, K4V3

FORMATS: dict[str, Format] = {item.name: item for item in (FP8, INT8, INT4, INT2, K4V3)}
"""By name, as ``CacheConfig.quant_format`` has them."""

__all__ = ["FORMATS", "Codes", "Format", "Layout", "uniform_levels"]
