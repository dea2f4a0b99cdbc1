"""Generation settings: the tokens are those of ``model.generate``, and what cannot be done is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from bench.engine import decoding
from bench.engine.engine import Engine, Failure, Measurement
from bench.engine.inspect import inspect_prompt
from bench.methods.cell import Cell
from bench.methods.grid import grid
from tasks.base import Document, Generate, Sampling
from tasks.generation import RULES, Fate, Rule, counting

NEW = 12
LENGTHS = (90, 40, 7)

SETTINGS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.5},
    "penalty of the prompt": {"encoder_repetition_penalty": 1.8},
    "n-grams": {"no_repeat_ngram_size": 1},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "never": {"suppress_tokens": list(range(0, 400, 2))},
    "not at first": {"begin_suppress_tokens": list(range(200))},
    "bad words": {"bad_words_ids": [[token] for token in range(0, 380, 3)]},
    "bias": {"sequence_bias": [[[9], 30.0], [[9, 9], -50.0]]},
    "forced end": {"forced_eos_token_id": 7},
    "ends": {"eos_token_id": list(range(0, 400, 5))},
    "least new tokens": {"eos_token_id": list(range(0, 400, 2)), "min_new_tokens": 6},
    "least tokens": {"eos_token_id": list(range(0, 400, 2)), "min_length": 95},
    "ever sooner": {"exponential_decay_length_penalty": (2, 3.0)},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 40.0}},
    "valid": {"remove_invalid_values": True, "renormalize_logits": True},
    "stop strings": {"stop_strings": ["e", "1"]},
    "as shipped": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "max_length": 9,
        "max_new_tokens": 3,
        "cache_implementation": "static",
    },
}


def question(length: int = LENGTHS[0], **more: Any) -> Document:
    ids = torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Document(id=f"d{length}", request=Generate(prompt_ids=tuple(ids), max_new_tokens=NEW, **more))


def stock(tiny: Any, document: Document, **more: Any) -> tuple[int, ...]:
    """What ``model.generate`` answers with the model's own settings."""
    ids = torch.tensor([document.request.prompt_ids])
    more = {"max_new_tokens": NEW, "do_sample": False, "max_length": None, **more}
    output = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tiny.tokenizer, **more)
    return tuple(output[0, ids.shape[1] :].tolist())


def answers(
    tiny: Any, documents: Sequence[Document], cells: Sequence[Cell], batch_size: int = 1
) -> list[tuple[Document, Measurement | Failure]]:
    engine = Engine(tiny.model, tiny.tokenizer, cells, batch_size=batch_size)
    return list(engine.answer_batch([(document, cells) for document in documents]))


def full() -> list[Cell]:
    return grid(["full"], [{"cache_size": 256}], [8], None, {})


@pytest.fixture
def ships(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the model generation settings of its own."""

    def ship(**settings: Any) -> None:
        own = {"eos_token_id": tiny.tokenizer.eos_token_id, "pad_token_id": tiny.tokenizer.pad_token_id, **settings}
        monkeypatch.setattr(tiny.model, "generation_config", GenerationConfig(**own))

    return ship


@pytest.fixture(scope="module")
def plain(tiny: Any) -> dict[str, tuple[int, ...]]:
    """What is answered without settings."""
    return {document.id: stock(tiny, document) for document in map(question, LENGTHS)}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_generate(tiny: Any, ships: Any, plain: dict[str, tuple[int, ...]], name: str) -> None:
    documents = [question(length) for length in LENGTHS]
    ships(**SETTINGS[name])
    expected = {document.id: stock(tiny, document) for document in documents}
    assert (expected != plain) == (name != "valid"), "these settings change nothing"
    cells = grid(["full", "mix"], [{"cache_size": 256}], [8], ["int8"], {})
    for batch_size in (1, 4):
        found = answers(tiny, documents, cells, batch_size)
        assert len(found) == len(documents) * len(cells)
        for document, measured in found:
            assert isinstance(measured, Measurement), measured.error
            assert measured.answer.token_ids == expected[document.id], measured.cell


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
        {"max_time": 5.0},
        {"token_healing": True},
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tiny: Any, ships: Any, settings: dict[str, Any]) -> None:
    ships()
    tiny.model.generation_config.update(**settings)
    name, value = next(iter(settings.items()))
    ((_, failure),) = answers(tiny, [question()], full())
    assert isinstance(failure, Failure)
    assert failure.error.startswith(f"generation setting {name}={value!r}: ")


def test_settings_of_the_request_win(tiny: Any, ships: Any) -> None:
    ships()
    plain, biased = (stock(tiny, question(), **more) for more in ({}, {"repetition_penalty": 1.5}))
    ships(num_beams=4, repetition_penalty=1.5)
    beside = [
        question(generation={"num_beams": 1, "repetition_penalty": 1.0}),
        replace(question(generation={"num_beams": 1}), id="other"),
        replace(question(generation={"num_beams": 1, "repetition_penalty": None}), id="none"),
        replace(question(), id="beams"),
    ]
    found = {document.id: outcome for document, outcome in answers(tiny, beside, full(), batch_size=4)}
    assert isinstance(found.pop("beams"), Failure)
    assert [outcome.answer.token_ids for outcome in found.values()] == [plain, biased, plain]


def test_a_model_whose_settings_are_refused_is_warmed_up(tiny: Any, ships: Any) -> None:
    ships(num_beams=4)
    cells = grid(["full", "mix"], [{"cache_size": 64}], [8], ["int8"], {})
    assert "not compressed" not in Engine(tiny.model, tiny.tokenizer, cells).warm_up()


def test_a_value_of_no_use_is_a_failure_that_says_so(tiny: Any, ships: Any) -> None:
    ships()
    wrong = [question(generation={"repetition_penalty": -1.0}), question(40, generation={"bad_words_ids": [[9999]]})]
    for _, failure in answers(tiny, wrong, full()):
        assert isinstance(failure, Failure)
        assert failure.error.startswith("the generation settings: ")


def test_ends_of_a_request_beside_settings_of_the_model(tiny: Any, ships: Any) -> None:
    ships(repetition_penalty=1.3)
    for place in (0, 3):
        end = stock(tiny, question())[place]
        ends = [tiny.tokenizer.eos_token_id, end]
        ((_, measured),) = answers(tiny, [question(end_ids=(end,))], full())
        assert measured.answer.token_ids == stock(tiny, question(), min_new_tokens=1, eos_token_id=ends)


def test_without_settings_generate_is_not_asked(tiny: Any, ships: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ships(do_sample=True, temperature=0.5)
    monkeypatch.setattr(tiny.model, "generate", None)
    ((_, measured),) = answers(tiny, [question()], full())
    assert isinstance(measured, Measurement)


def test_what_becomes_of_the_models_settings_is_said(tiny: Any, ships: Any) -> None:
    ships()
    assert decoding.about(tiny.model) is None
    ships(repetition_penalty=1.1, do_sample=True, top_k=20)
    assert decoding.about(tiny.model) == (
        "of its generation_config.json, repetition_penalty=1.1 is applied and do_sample=True, top_k=20 are not "
        "where answers are decoded greedily"
    )


def test_a_look_inside_decodes_likewise(tiny: Any, ships: Any) -> None:
    ships(repetition_penalty=1.5)
    (cell,) = grid(["mix"], [{"cache_size": 256}], [8], ["int8"], {})
    ids = list(question().request.prompt_ids)
    names = {"model": "tiny", "source": "", "label": ""}
    look = inspect_prompt(tiny.model, tiny.tokenizer, cell, ids, steps=NEW, names=names)
    expected = [*ids, *stock(tiny, question())]
    assert "".join(look.pieces) == tiny.tokenizer.decode(expected)


def test_every_field_has_a_rule() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= RULES.keys()


def test_what_transformers_adds_later_is_refused(tiny: Any, ships: Any) -> None:
    ships(no_repeat_ngram_size=3, something_of_the_models_own=1)
    whole = dict(RULES)
    del RULES["no_repeat_ngram_size"]
    try:
        ((_, failure),) = answers(tiny, [question()], full())
    finally:
        # All in their own order again, in which a page lists them.
        RULES.clear()
        RULES.update(whole)
    assert isinstance(failure, Failure)
    assert failure.error == "generation setting no_repeat_ngram_size=3: this setting is not known here"


def test_defaults_of_generate_ask_for_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``generate`` fills in what nobody has set, the rules have the same values."""
    prepared = []

    def look(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **more: Any
    ) -> None:
        prepared.append(generation_config)

    monkeypatch.setattr(tiny.model, "generation_config", GenerationConfig())
    tiny.model.generate(torch.tensor([[1, 2]]), custom_generate=look)
    own = {name: value for name, value in vars(prepared[0]).items() if name in RULES and name != "max_length"}
    assert {name: value for name, value in own.items() if RULES[name].asks(value)}.keys() <= {"transformers_version"}
    assert all(isinstance(rule, Rule) and rule.fate in Fate for rule in RULES.values())


def sampled(document: Document, **more: Any) -> Document:
    settings = {"temperature": 0.8, "seed": 5, **more}
    return replace(document, request=replace(document.request, sampling=Sampling(**settings)))


@pytest.mark.parametrize("shipped", [{}, {"top_k": 7, "repetition_penalty": 1.3, "temperature": 0.1}])
@pytest.mark.parametrize("top_p", [None, 0.7])
def test_what_full_draws_is_what_generate_draws(tiny: Any, ships: Any, shipped: Any, top_p: float | None) -> None:
    ships(**shipped)
    document = question()
    (_, found), *_ = answers(tiny, [sampled(document, top_p=top_p)], full())
    assert isinstance(found, Measurement), found
    torch.manual_seed(5)
    given = {} if top_p is None else {"top_p": top_p}
    expected = stock(tiny, document, do_sample=True, temperature=0.8, **given)
    assert found.answer.token_ids == expected
    assert expected != stock(tiny, document)


def test_settings_that_are_given_draw_too(tiny: Any) -> None:
    document = question()
    request = replace(sampled(document).request, generation=counting({"top_k": 3, "do_sample": None}))
    (_, found), *_ = answers(tiny, [replace(document, request=request)], full())
    assert isinstance(found, Measurement), found
    torch.manual_seed(5)
    assert found.answer.token_ids == stock(tiny, document, do_sample=True, temperature=0.8, top_k=3)
    torch.manual_seed(5)
    assert found.answer.token_ids != stock(tiny, document, do_sample=True, temperature=0.8)


def test_draws_depend_on_the_answer_alone(tiny: Any) -> None:
    cells = grid(["full", "window", "mix"], [{"cache_size": 256}], [8], ["int8"], {})
    documents = [sampled(question(length), seed=length) for length in LENGTHS]
    alone = {(item.id, found.cell.key): found.answer for item, found in answers(tiny, documents, cells)}
    beside = {(item.id, found.cell.key): found.answer for item, found in answers(tiny, documents, cells, batch_size=3)}
    assert alone == beside
    # Nothing is compressed: with the same draws all methods say the same.
    assert len({(name, answer.token_ids) for (name, _), answer in alone.items()}) == len(LENGTHS)
