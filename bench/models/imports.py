"""transformers without what it imports wherever that is installed, and no command needs: torch's compiler and its
tensors over several processes, scikit-learn, SciPy's optimizers, HQQ, Triton."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.models.later import Compiler, Later

COMPILER, TENSORS = "torch._dynamo", "torch.distributed.tensor"
MASKS_TAKE = f"{COMPILER}._trace_wrapped_higher_order_op"


def import_lightly() -> None:
    """Import transformers for a command: less memory, seconds less to wait, and nothing else is different.

    Its tools for debugging a model take torch's tensors over several processes, its masks a mode of torch's compiler,
    for masks that are made element by element; torch itself takes that compiler, to tell it not to compile a function.
    With them comes SymPy, too. Here they are imported when something is asked of them (:mod:`bench.models.later`).

    A step of its assisted generation takes a function of scikit-learn, which brings pandas and SciPy along, and which
    lm-eval has installed. Here it is imported when that step calls it.

    Its losses of object detection take one of SciPy: likewise.

    Its quantized caches and weights take HQQ, which brings torch's compiler along. Here it is imported when one of them
    is made, by the very check whether it is there.

    The compiler takes a type of Triton, whose library is large, and which compiles for nothing but accelerators. It is
    imported where there is one.
    """
    import torch.utils._triton

    if "transformers.cache_utils" in sys.modules:
        return
    has_accelerator = torch.accelerator.is_available()
    if COMPILER not in sys.modules:
        Compiler(lambda: _hidden(torch.utils._triton, "has_triton_package", unless=has_accelerator))
    if TENSORS not in sys.modules and torch.distributed.is_available():
        torch.distributed.tensor = Later(TENSORS)
    import transformers.utils

    utils: Any = transformers.utils
    has_sklearn, has_hqq = utils.is_sklearn_available(), utils.is_hqq_available()
    has_scipy = utils.is_scipy_available()
    with (
        _hidden(utils, "is_sklearn_available"),
        _hidden(utils, "is_hqq_available"),
        _hidden(utils, "is_scipy_available"),
        _masks_alone(),
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


@contextmanager
def _masks_alone() -> Iterator[None]:
    """Masks are imported meanwhile, and what they take of the compiler is not."""
    if not isinstance(sys.modules[COMPILER], Compiler):
        yield
        return
    module = Later(MASKS_TAKE, TransformGetItemToIndex=_index_by_tensors)
    try:
        yield
    finally:
        if module.stands_in:
            del sys.modules[MASKS_TAKE]


def _index_by_tensors() -> Any:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


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
