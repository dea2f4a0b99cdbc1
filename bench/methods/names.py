"""Methods of other libraries by name, and what is said of all methods: read without torch or any of these libraries."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from bench.errors import UserError
from bench.methods.press_names import parse_press
from bench.names import DESCRIPTIONS, HF, KVPRESS, LIMITS, install_extra
from tasks.errors import nearest

EXTRA = install_extra("peers")
DISTRIBUTIONS = {"quanto": "optimum-quanto", "hqq": "hqq", KVPRESS: "kvpress"}
"""What a method of a library needs."""

BACKENDS: Mapping[str, tuple[str, int]] = {
    "quanto-int4": ("quanto", 4),
    "quanto-int2": ("quanto", 2),
    "hqq-int4": ("hqq", 4),
    "hqq-int2": ("hqq", 2),
    "fp8": ("fp8", 8),
}
"""Backend of transformers and bits of each ``hf:`` method."""

METHOD_GROUP, TASK_GROUP = "arkv_bench.methods", "arkv_bench.tasks"
"""Entry points by which installed packages offer methods and tasks."""


@dataclass(frozen=True)
class Press:
    """A press of kvpress."""

    class_name: str
    unusable: str | None = None
    """Why it cannot be compared at a budget; None where it can."""
    masks: bool = False
    """It masks tokens of single heads, which stay stored."""
    needs: str | None = None
    """What it would have to fetch, for the models that its authors made it for; None where it needs nothing."""
    decodes: str | None = None
    """When it compresses beside, or in the place of, the prefill."""
    divides: bool = False
    """It has to know where in a prompt the question begins."""

    @property
    def usable(self) -> bool:
        """Whether it can be asked for a share of the tokens of one prompt, with any model."""
        return self.unusable is None and self.needs is None


_SCORES_DECODING = "it compresses while decoding, in a way of its own"
_THRESHOLD = "it has a threshold in the place of a ratio"

PRESSES: Mapping[str, Press] = {
    "adakv": Press("AdaKVPress", masks=True),
    "base": Press("BasePress", "it is the base class of all presses"),
    "block": Press("BlockPress"),
    "cam": Press("CAMPress", _SCORES_DECODING),
    "cap": Press("CapPress"),
    "chunk": Press("ChunkPress"),
    "chunkkv": Press("ChunkKVPress"),
    "compactor": Press("CompactorPress"),
    "composed": Press("ComposedPress", "it needs a list of presses"),
    "compression_ratio_decoding": Press("CompressionRatioDecodingPress", _SCORES_DECODING),
    "criticaladakv": Press("CriticalAdaKVPress", masks=True),
    "criticalkv": Press("CriticalKVPress"),
    "cur": Press("CURPress"),
    "decoding": Press("DecodingPress", decodes="leaves the prompt whole until then"),
    "dms": Press("DMSPress", _THRESHOLD),
    "duo_attention": Press("DuoAttentionPress", "its heads, not a budget, say what is kept"),
    "entropy_gated_chunkkv": Press("EntropyGatedChunkKVPress"),
    "expected_attention": Press("ExpectedAttentionPress"),
    "expected_attention_with_stats": Press(
        "ExpectedAttentionStatsPress", needs="statistics of the model's queries, a download"
    ),
    "fastkvzip": Press("FastKVzipPress", needs="gates trained for the model, a download"),
    "finch": Press("FinchPress", divides=True),
    "key_rerotation": Press("KeyRerotationPress"),
    "keydiff": Press("KeyDiffPress"),
    "knorm": Press("KnormPress"),
    "kvcompose": Press("KVComposePress"),
    "kvgrad": Press("KVgradPress", masks=True),
    "kvzap": Press("KVzapPress", needs="another model, trained to score this one's tokens, a download"),
    "kvzip": Press("KVzipPress", masks=True),
    "lagkv": Press("LagKVPress"),
    "leverage": Press("LeverageScorePress"),
    "lukv": Press("LUKVPress", needs="a curve of budgets measured with the model, a download"),
    "merging": Press("MergingPress"),
    "non_causal_attention": Press("NonCausalAttnPress"),
    "observed_attention": Press("ObservedAttentionPress", "it needs eager attention over the whole prompt"),
    "per_layer_compression": Press("PerLayerCompressionPress", "it needs a ratio for every layer"),
    "prefill_decoding": Press("PrefillDecodingPress", decodes="the answer's tokens come on top until then"),
    "pyramidkv": Press("PyramidKVPress"),
    "qfilter": Press("QFilterPress", needs="filters computed for the model, a download"),
    "random": Press("RandomPress"),
    "restorekv": Press("RestoreKVPress", needs="embeddings trained for the model, a download"),
    "scorer": Press("ScorerPress", "it is the base class of presses that score"),
    "simlayerkv": Press("SimLayerKVPress", _THRESHOLD),
    "snapkv": Press("SnapKVPress"),
    "streaming_llm": Press("StreamingLLMPress"),
    "think": Press("ThinKPress", "it removes channels, not tokens"),
    "tova": Press("TOVAPress"),
}
"""Every press of the kvpress that is asked for, by the name of its module, or of its class where a module has several.
A test holds the table to the installed library."""


AT_PREFILL = "compresses at prefill only, the answer's tokens come on top"
MASKS = f"masks tokens of single heads, which stay stored, so that it frees no bytes; {AT_PREFILL}"
MASKS_QUANTIZED = f"masks tokens of single heads, which stay stored, so that only quantizing frees bytes; {AT_PREFILL}"
DIVIDES = f"takes prompts that their questions stand in (--question before), and no others; {AT_PREFILL}"
DECODES = "compresses to its budget every {interval} tokens that it reads or writes (compression_interval)"
"""What a press cannot meet."""
IN_A_WORD = {MASKS: "masked", MASKS_QUANTIZED: "masked", AT_PREFILL: "answer on top"}
"""The same where there is room for no more, as in a row that stands at other bytes than it was asked for."""


def library_of(method: str) -> str | None:
    """The library that a method's name asks for: ``hf:fp8`` is one of ``hf``. None for a plain name."""
    library, colon, _ = method.partition(":")
    return library if colon else None


def full_name(method: str, own: Container[str] = ()) -> str:
    """A method's name with its library: ``snapkv`` is ``kvpress:snapkv``, ``quanto-int4`` is ``hf:quanto-int4``.

    Args:
        own: methods of the user's own, which have their names to themselves, as the suite's do.
    """
    if method in DESCRIPTIONS or method in own:
        return method
    first = re.split(r"[+\[]", method, maxsplit=1)[0]
    library = KVPRESS if first in PRESSES else HF if method in BACKENDS else None
    return method if library is None else f"{library}:{method}"


def check_methods(methods: Iterable[str], own: Iterable[str] = ()) -> None:
    """Raises :class:`UserError` (exit code 2) for the first unknown method, naming the nearest known one.

    Args:
        own: methods of the user's own.
    """
    known = [*DESCRIPTIONS, *own]
    for method in methods:
        if method not in known and library_of(method) is None:
            raise UserError(f"unknown method {method!r}: {nearest(method, known)}", exit_code=2)


def limits_of(method: str) -> str:
    """What a method cannot meet, by its name alone; empty where nothing is known."""
    library = library_of(method)
    if library == KVPRESS:
        asked = parse_press(method, BACKENDS)
        parts = [part for part in asked.parts if part.name in PRESSES]
        presses = [PRESSES[part.name] for part in parts]
        for part, press in zip(parts, presses, strict=True):
            if press.decodes is not None:
                interval = part.options.get("compression_interval", "512")
                return f"{DECODES.format(interval=interval)}, {press.decodes}"
        if any(press.divides for press in presses):
            return DIVIDES
        if any(press.masks for press in presses):
            return MASKS if asked.backend is None else MASKS_QUANTIZED
        return AT_PREFILL
    return LIMITS.get(method) or LIMITS.get(library or "", "")


def usable_presses() -> list[str]:
    """Presses that can be compared with any model, sorted."""
    return [name for name, press in PRESSES.items() if press.usable]


def descriptions() -> list[tuple[str, str]]:
    """Names of all methods of the suite and of libraries, and what is special about them, for a list that a person
    reads."""
    found = list(DESCRIPTIONS.items())
    found += [
        (f"{HF}:{name}", f"transformers' QuantizedCache, {name}: {limits_of(f'{HF}:{name}')}") for name in BACKENDS
    ]
    usable = ", ".join(usable_presses())
    found.append((f"{KVPRESS}:NAME", f"a press of kvpress ({EXTRA}): {LIMITS[KVPRESS]}. NAME: {usable}"))
    found.append((f"{KVPRESS}:finch", limits_of(f"{KVPRESS}:finch")))
    wrapping = f"{KVPRESS}:adakv+expected_attention: a press that wraps another one than snapkv"
    options = f"{KVPRESS}:kvzip[kvzip_plus_normalization=true]: options of a press"
    stored = f"{KVPRESS}:kvzip+quanto-int4: what the press leaves goes into transformers' QuantizedCache"
    found.append((f"{KVPRESS}:A+B", "; ".join((wrapping, options, stored))))
    needing = "; ".join(f"{name} ({press.needs})" for name, press in PRESSES.items() if press.needs)
    found.append(
        (f"{KVPRESS}:...", f"presses that are not offered, since they need something for each model: {needing}")
    )
    return found
