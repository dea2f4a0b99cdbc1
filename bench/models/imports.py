"""transformers without scikit-learn, which it imports wherever that is installed, and no command needs."""

from __future__ import annotations

import sys
from typing import Any


def import_lightly() -> None:
    """Import transformers for a command: less memory, seconds less to wait, and nothing else is different.

    A step of its assisted generation takes a function of scikit-learn, which brings pandas and SciPy along, and which
    lm-eval has installed. Here it is imported when that step calls it.
    """
    import transformers.utils

    name = "transformers.generation.candidate_generator"
    if name in sys.modules:
        return
    utils: Any = transformers.utils
    is_there = utils.is_sklearn_available
    utils.is_sklearn_available = _is_not_there
    try:
        from transformers.generation import candidate_generator
    finally:
        utils.is_sklearn_available = is_there
    module: Any = candidate_generator
    module.is_sklearn_available = is_there
    if is_there():
        module.roc_curve = _roc_curve


def _is_not_there() -> bool:
    return False


def _roc_curve(*arguments: Any, **named: Any) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(*arguments, **named)
