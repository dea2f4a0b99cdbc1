"""Generation settings of transformers (``GenerationConfig``): which of them decoding through a compressed cache
applies, which make no difference to it, and which it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple


class Fate(StrEnum):
    """What becomes of a setting."""

    APPLIED = "applied"
    IGNORED = "ignored"
    REFUSED = "refused"


class Rule(NamedTuple):
    """What becomes of one setting, wherever it asks for anything."""

    fate: Fate
    why: str
    neutral: tuple[Any, ...] = ()
    """Values that ask for nothing, beside None; the first one is transformers' default."""

    def asks(self, value: Any) -> bool:
        return value is not None and value not in self.neutral


def _rules(fate: Fate, why: str, **neutral: tuple[Any, ...]) -> dict[str, Rule]:
    return {name: Rule(fate, why, values) for name, values in neutral.items()}


_SAMPLING = (
    "answers are decoded greedily; with `--temperature` they are sampled, and the model's own ones and those of "
    "`--gen-kwargs` applied"
)
_BEAMS = "of beam search only"
_ASSISTANTS = "of assisted generation only"
_OUTPUT = "what else `generate` returns"
_CACHE = "the method says which cache there is"
_SPEED = "how `generate` runs a model"
_ONE_BEAM = "answers are decoded greedily, one beam"
_ASSISTED = "assisted generation takes tokens back, which a compressed cache cannot"

RULES: dict[str, Rule] = {
    **_rules(
        Fate.APPLIED,
        "as `generate` does",
        bad_words_ids=(),
        begin_suppress_tokens=(),
        encoder_no_repeat_ngram_size=(0,),
        encoder_repetition_penalty=(1.0,),
        exponential_decay_length_penalty=(),
        forced_bos_token_id=(),
        forced_eos_token_id=(),
        min_length=(0,),
        min_new_tokens=(0,),
        no_repeat_ngram_size=(0,),
        remove_invalid_values=(False,),
        renormalize_logits=(False,),
        repetition_penalty=(1.0,),
        sequence_bias=(),
        stop_strings=(),
        suppress_tokens=(),
        watermarking_config=(),
    ),
    **_rules(Fate.APPLIED, "ends an answer, as does the tokenizer's end-of-sequence token", eos_token_id=()),
    **_rules(
        Fate.IGNORED,
        _SAMPLING,
        do_sample=(False,),
        temperature=(1.0,),
        top_k=(50,),
        top_p=(1.0,),
        top_h=(),
        min_p=(),
        typical_p=(1.0,),
        epsilon_cutoff=(0.0,),
        eta_cutoff=(0.0,),
    ),
    **_rules(Fate.IGNORED, _BEAMS, early_stopping=(False,), length_penalty=(1.0,), diversity_penalty=(0.0,)),
    **_rules(
        Fate.IGNORED,
        _ASSISTANTS,
        assistant_confidence_threshold=(0.4,),
        assistant_ensemble_weight=(),
        assistant_lookbehind=(10,),
        max_matching_ngram_size=(),
        num_assistant_tokens=(20,),
        num_assistant_tokens_schedule=("constant",),
        speculation_type=(),
        target_lookbehind=(10,),
    ),
    **_rules(Fate.IGNORED, "of contrastive search only", low_memory=(False,)),
    **_rules(Fate.IGNORED, "the task says how long an answer may be", max_length=(), max_new_tokens=()),
    **_rules(
        Fate.IGNORED,
        "a prompt comes as tokens, without padding",
        bos_token_id=(),
        decoder_start_token_id=(),
        pad_token_id=(),
    ),
    **_rules(
        Fate.IGNORED,
        _OUTPUT,
        output_attentions=(False,),
        output_hidden_states=(False,),
        output_logits=(False,),
        output_scores=(False,),
        return_dict_in_generate=(False,),
    ),
    **_rules(Fate.IGNORED, _CACHE, cache_config=(), cache_implementation=(), max_cache_len=(), use_cache=(True, False)),
    **_rules(
        Fate.IGNORED,
        _SPEED,
        compile_config=(),
        continuous_batching_config=(),
        disable_compile=(False,),
        prefill_chunk_size=(),
    ),
    **_rules(Fate.IGNORED, "not a setting", transformers_version=()),
    **_rules(Fate.REFUSED, _ONE_BEAM, num_beams=(1,), num_beam_groups=(1,), constraints=(), force_words_ids=()),
    **_rules(Fate.REFUSED, "a document has one answer", num_return_sequences=(1,)),
    **_rules(
        Fate.REFUSED,
        _ASSISTED,
        assistant_early_exit=(),
        is_assistant=(False,),
        prompt_lookup_num_tokens=(),
        use_mtp=(False,),
    ),
    **_rules(Fate.REFUSED, "contrastive search reads several tokens in the place of one", penalty_alpha=(0.0,)),
    **_rules(Fate.REFUSED, "DoLa reads the output of single layers", dola_layers=()),
    **_rules(Fate.REFUSED, "guidance reads a second prompt, which has no cache here", guidance_scale=(1.0,)),
    **_rules(Fate.REFUSED, "token healing changes the prompt", token_healing=(False,)),
    **_rules(Fate.REFUSED, "answers would depend on the machine's speed", max_time=()),
}
"""Every field of ``GenerationConfig``, of all versions of transformers that can be used."""

SAMPLING = frozenset(name for name, rule in RULES.items() if rule.why == _SAMPLING)
"""Settings of sampling: they count where answers are sampled."""

DRAWING = SAMPLING - {"do_sample", "temperature"}
"""Those of them that do not say whether answers are sampled."""


def asked(settings: Mapping[str, Any], fate: Fate) -> dict[str, Any]:
    """The settings with this fate that ask for anything. One that is not known is refused."""
    unknown = Rule(Fate.REFUSED, "not known here")
    return {
        name: value
        for name, value in settings.items()
        if (rule := RULES.get(name, unknown)).fate is fate and rule.asks(value)
    }


def refusal(settings: Mapping[str, Any]) -> str | None:
    """Which of the settings cannot be done and why, or None."""
    for name, value in asked(settings, Fate.REFUSED).items():
        return f"{name}={value!r}: {RULES[name].why if name in RULES else 'this setting is not known here'}"
    return None


def counting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of settings that somebody gives changes an answer, be it a sampled one. Raises ValueError for what cannot be
    done."""
    samples, temperature = settings.get("do_sample"), settings.get("temperature")
    if samples or (samples is None and temperature):
        raise ValueError(
            "samples its answers: for that give --temperature, or for greedy ones do_sample=False in gen_kwargs"
        )
    if said := refusal(settings):
        raise ValueError(f"generation setting {said}")
    return {name: value for name, value in settings.items() if RULES[name].fate is not Fate.IGNORED or name in DRAWING}


def listed(settings: Mapping[str, Any]) -> str:
    """Settings for a person."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
