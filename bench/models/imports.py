"""transformers without what it imports wherever that is installed, and no command needs: scikit-learn, SciPy's
optimizers, HQQ, Triton."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def import_lightly() -> None:
    """Import transformers for a command: less memory, seconds less to wait, and nothing else is different.

    A step of its assisted generation takes a function of scikit-learn, which brings pandas and SciPy along, and which
    lm-eval has installed. Here it is imported when that step calls it.

    Its losses of object detection take one of SciPy: likewise.

    Its quantized caches and weights take HQQ, which brings torch's compiler along. Here it is imported when one of them
    is made, by the very check whether it is there.

    The part of torch's compiler that it does import takes a type of Triton, whose library is large, and which compiles
    for nothing but accelerators. Here it is imported where there is one.
    """
    import torch.utils._triton
    import transformers.utils

    if "transformers.cache_utils" in sys.modules:
        return
    utils: Any = transformers.utils
    has_sklearn, has_hqq = utils.is_sklearn_available(), utils.is_hqq_available()
    has_scipy = utils.is_scipy_available()
    with (
        _hidden(utils, "is_sklearn_available"),
        _hidden(utils, "is_hqq_available"),
        _hidden(utils, "is_scipy_available"),
        _hidden(torch.utils._triton, "has_triton_package", unless=torch.accelerator.is_available()),
    ):
        from transformers import cache_utils, masking_utils  # noqa: F401
        from transformers.generation import candidate_generator
        from transformers.loss import loss_utils  # noqa: F401
        from transformers.quantizers import quantizer_hqq
    sampling: Any = candidate_generator
    if has_sklearn:
        sampling.roc_curve = _roc_curve
    module: Any
    for name, module in list(sys.modules.items()) if has_scipy else ():
        if name.startswith("transformers.loss.") and hasattr(module, "is_scipy_available"):
            module.linear_sum_assignment = _linear_sum_assignment
    for module in (cache_utils, quantizer_hqq) if has_hqq else ():
        module.is_hqq_available = _import_hqq


@contextmanager
def _hidden(module: Any, name: str, *, unless: bool = False) -> Iterator[None]:
    """Whatever is imported meanwhile finds by the check of this name that a library is not there; by the time that it
    calls it, it is."""
    check = getattr(module, name)

    def is_not_there(*_: Any) -> bool:
        return False

    if not unless:
        setattr(module, name, is_not_there)
    try:
        yield
    finally:
        for found in list(sys.modules.values()):
            if getattr(found, "__dict__", {}).get(name) is is_not_there:
                setattr(found, name, check)


def _roc_curve(*arguments: Any, **named: Any) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(*arguments, **named)


def _linear_sum_assignment(*arguments: Any, **named: Any) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(*arguments, **named)


def _import_hqq() -> bool:
    """The check that stands before every use of HQQ, the first time: the two modules get what they were imported
    without."""
    from hqq.core.quantize import Quantizer
    from transformers import cache_utils, utils
    from transformers.quantizers import quantizer_hqq

    caches: Any = cache_utils
    caches.HQQQuantizer, caches.is_hqq_available = Quantizer, utils.is_hqq_available
    # Its own lines for HQQ's layers stand where it is imported.
    importlib.reload(quantizer_hqq)
    return True
