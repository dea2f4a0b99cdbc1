"""Names and words that everything else uses: methods, budgets, the files of a folder. Needs no library at all.

What reads and shows finished runs knows methods by these names and never loads the code of one.
"""

from __future__ import annotations

FULL = "full"
"""The stock full cache, which every method is compared with."""

DESCRIPTIONS = {
    FULL: "everything at model precision, a stock transformers cache: the baseline",
    "window": "attention sinks and the newest tokens within the budget (StreamingLLM)",
    "origin": "the tokens that get most attention and the newest, all at model precision: eviction only",
    "quant": "the same, all but the newest quantized",
    "mix": "ARKV: Original and Quantized by each layer's OQ ratio, the rest evicted",
    "mix-replay": "mix by a second reading of the prompt (KVzip), for questions behind it; costs another prefill",
}
"""The suite's own methods in a line each."""
TRISTATE = tuple(name for name in DESCRIPTIONS if name != FULL)
"""Those of :data:`arkv.METHODS`."""

HF, KVPRESS = "hf", "kvpress"
"""What precedes the colon in the names of methods of other libraries."""
LIMITS = {
    HF: "fixed size; quantizes the newest prompt tokens too, and everything again every 128 tokens",
    f"{HF}:fp8": "fixed size; a scale for all keys and one for all values of a layer, of the prompt",
    KVPRESS: "compresses at prefill only, the answer's tokens come on top; some presses mask tokens and free no bytes",
}
"""What the methods of a library, or one of them, cannot meet."""

FUSED = "full-fused"
"""Everything at model precision, read by the suite's own decoding kernel: what of a factor over ``full`` is not owed to
evicting or quantizing anything."""
CEILING = "ceiling"
"""A stock cache that holds only C tokens: the fastest that any cache of that budget could be."""

BUDGET_UNITS = {
    "tokens": "tokens in every layer, however many bytes each takes",
    "bytes": "bytes of so many tokens at model precision, into which more quantized tokens fit",
}
"""What a budget counts."""

LEAST_DOCUMENTS = 5
"""Of fewer documents no interval is given: resamples of equal documents alone would decide its ends."""

SAMPLES, DOCUMENTS, RECORD = "samples.jsonl", "documents.jsonl", "record.json"
RESULTS, CURVE, STATES = "results.csv", "curve.csv", "states.json"
"""The files of a run's folder."""
SPEED = "speed.csv"
"""The timings of a folder of ``arkv-bench speed``."""


def with_format(method: str, quant_format: str | None) -> str:
    """A method with the format of its quantized tokens, where its name does not end with it."""
    return method if quant_format is None or method.endswith(quant_format) else f"{method} {quant_format}"


QUESTION_AFTER = " (question after)"
"""How the name of a task ends whose questions are read behind the compressed context."""


def asked_after(task: str) -> str:
    """The name of a task with its questions behind the contexts: another one than with the questions inside."""
    return f"{task}{QUESTION_AFTER}"


def own_name(task: str) -> str:
    """The name of a task, wherever its questions stand."""
    return task.removesuffix(QUESTION_AFTER)


def budget_text(unit: str | None, cache_size: int | None, cache_ratio: float | None) -> str:
    """A budget for a person; empty where there is none."""
    if cache_ratio is not None:
        return f"{100 * cache_ratio:g} % of each prompt's {unit}"
    if cache_size is None:
        return ""
    counted = "tokens per layer" if unit == "tokens" else "tokens' worth of bytes per layer"
    return f"C={cache_size} {counted}"


def install_extra(extra: str) -> str:
    """How to get what an extra of pyproject.toml has: no index has the suite itself, a checkout does."""
    return f"make env in the checkout, or pip install -c constraints.txt -e '.[{extra}]' there"
