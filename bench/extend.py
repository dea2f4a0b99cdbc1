"""A cache method of your own: the interface, and what most methods need.

A :class:`Method` gets a prompt that the model has read, and gives back a cache from which the model goes on. Bytes,
statistics, tables and the handling of failures are the suite's. ``docs/plugins.md`` is the recipe;
:mod:`bench.methods.plugins` finds methods and tasks, :mod:`bench.methods.base` has all that a method can say.
"""

from bench.errors import OthersCode
from bench.methods.base import Method
from bench.methods.kept import KeptLayer, keep_tokens
from bench.methods.prompt import Budget, Prompt
from bench.methods.states import EVICTED, ORIGINAL, QUANTIZED

__all__ = [
    "EVICTED",
    "ORIGINAL",
    "QUANTIZED",
    "Budget",
    "KeptLayer",
    "Method",
    "OthersCode",
    "Prompt",
    "keep_tokens",
]
