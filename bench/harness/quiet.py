"""lm-eval without its bars, prints and advice."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval: bars and prints that have no switch of their own, and advice on settings that we chose."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars_disabled = logger.level, datasets.utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars_disabled:
            datasets.enable_progress_bars()
