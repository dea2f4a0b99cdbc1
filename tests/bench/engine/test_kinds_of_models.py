"""Models that no compressed cache serves, or not in every layer: what can be measured is, and the rest says why not."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, cache_utils

from arkv.config import NotCompressible
from bench.engine.engine import Engine, Failure, Measurement
from bench.methods.cell import Cell
from bench.methods.grid import grid
from bench.methods.hf import FP8_LAYER
from bench.methods.prompt import StockPrefill
from bench.methods.reading import record
from tasks.base import Compare, Continuation, Document, Generate, LogLikelihood, Request, Rolling
from tests.arkv.families import FAMILIES, INDEXED, ITSELF, NO_INTERFACE, NOTHING, SHARED, SLIDING, Family

TOKENIZER: Any = SimpleNamespace(eos_token_id=None, decode=lambda ids, skip_special_tokens=True: str(list(ids)))
QUANTIZING = "hf:fp8" if hasattr(cache_utils, FP8_LAYER) else "hf:hqq-int4"
OWN_STATES = ("recurrent_gemma", "kimi_linear")
"""They keep states of layers without attention, by means of their own."""
SERVED = [
    family
    for family in FAMILIES
    if family.name not in OWN_STATES and family.verdict in (INDEXED, ITSELF, NO_INTERFACE, NOTHING, SHARED)
]
needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed")
USUAL = ("bloom", "falcon", "mpt", "gptj", "doge", "mistral")


def cells(*methods: str, cache_size: int = 16) -> list[Cell]:
    return grid(methods, [{"cache_size": cache_size}], [8], ["int8"], {"budget_unit": "tokens"})


def build(family: Family) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def ids(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist())


def generated(model: Any, request: Generate) -> list[int]:
    prompt = torch.tensor([request.prompt_ids])
    options = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return output[0, prompt.shape[1] :].tolist()


def answer(model: Any, asked: list[Cell], *requests: Request) -> dict[tuple[int, str], Measurement | Failure]:
    """Outcomes by the place of the request and the method."""
    documents = [Document(id=str(place), request=request) for place, request in enumerate(requests)]
    outcomes = Engine(model, TOKENIZER, asked, batch_size=2).answer_batch([(each, asked) for each in documents])
    return {(int(each.id), outcome.cell.method): outcome for each, outcome in outcomes}


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, id=family.name, marks=() if family.name in USUAL else pytest.mark.slow) for family in SERVED],
)
def test_where_no_compressed_cache_serves_full_and_its_peers_do(family: Family) -> None:
    """Of rows that share a forward elsewhere, too; and the methods of this library say why they do not."""
    model = build(family)
    window = Continuation(context_ids=ids(20), token_ids=ids(5))
    requests: list[Request] = [
        Generate(prompt_ids=ids(40), max_new_tokens=4),
        Generate(prompt_ids=ids(30), max_new_tokens=4),
        LogLikelihood(continuations=(window, Continuation(context_ids=ids(20), token_ids=ids(3)))),
        Rolling(windows=(Continuation(context_ids=ids(2), token_ids=ids(20)),)),
    ]
    found = answer(model, cells("full", "mix", QUANTIZING), *requests)
    for place, request in enumerate(requests):
        full, mine, other = (found[place, method] for method in ("full", "mix", QUANTIZING))
        assert isinstance(full, Measurement), full
        assert isinstance(mine, Failure)
        assert f"'{family.name}'" in mine.error
        assert "with attach" not in mine.error
        if isinstance(other, Failure):
            assert "QuantizedCache knows no layers" in other.error or "seen" in other.error
        if isinstance(request, Generate):
            assert list(full.answer.token_ids) == generated(model, request)
            assert full.tokens_original == request.prompt_tokens + 3
            assert full.tokens_evicted == 0


def test_methods_without_a_budget_of_their_own_are_told_why_there_are_no_layers() -> None:
    model = build(next(family for family in SERVED if family.name == "bloom"))
    with torch.inference_mode():
        (prompt,) = record(model, [ids(20)], 4)
    assert isinstance(prompt.cache, StockPrefill)
    assert prompt.cache.full_bytes(20) == prompt.cache.nbytes() == 2 * 2 * 20 * 64 * 4
    with pytest.raises(ValueError, match="'bloom' has no attention interface"):
        _ = prompt.layers


def test_what_else_a_layer_keeps_of_each_token_counts() -> None:
    """Such as the keys of an indexer [1, N, D], which newer versions of transformers keep in the cache."""
    cache = cache_utils.DynamicCache()
    cache.update(torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 20, 8), 0)
    cache.layers[0].indexer_keys = torch.zeros(1, 20, 4)  # type: ignore[attr-defined]
    prompt = StockPrefill(cache, NotCompressible("no"))
    assert prompt.full_bytes(20) == prompt.nbytes() == 20 * (2 * 2 * 8 + 4) * 4
    assert prompt.full_bytes(5) * 4 == prompt.nbytes()


@needs_kvpress
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "cohere2"])
def test_a_press_leaves_layers_with_a_window_as_they_are(name: str) -> None:
    model = build(Family(name, "", "", {**SLIDING, "use_sliding_window": True}))
    request = Generate(prompt_ids=ids(60), max_new_tokens=9)
    small = answer(model, cells("full", "kvpress:knorm", cache_size=24), request)
    full, pressed = small[0, "full"], small[0, "kvpress:knorm"]
    assert isinstance(full, Measurement)
    assert isinstance(pressed, Measurement), pressed
    # Of the prompt's 60 tokens 24 stay in the layer with full attention; 8 more come, each of 256 bytes.
    assert pressed.tokens_original == 24 + 8
    assert pressed.tokens_evicted == 36
    assert full.kv_bytes - pressed.kv_bytes == 36 * 2 * 2 * 16 * 4
    large = answer(model, cells("full", "kvpress:knorm", "kvpress:snapkv", cache_size=128), request)
    for outcome in large.values():
        assert isinstance(outcome, Measurement), outcome
        assert list(outcome.answer.token_ids) == generated(model, request)
        assert outcome.kv_bytes == full.kv_bytes


@needs_kvpress
@pytest.mark.parametrize(
    "name, settings, said_",
    [
        ("knorm", {"sliding_window": 16}, "sliding window in all layers"),
        ("kvzip", SLIDING, "works on the cache as a whole"),
        ("key_rerotation", SLIDING, "turns what it keeps to new positions"),
    ],
)
def test_a_press_that_cannot_spare_windows_is_refused(name: str, settings: dict[str, Any], said_: str) -> None:
    kind = "mistral" if "layer_types" not in settings else "gemma3_text"
    assert kind in CONFIG_MAPPING
    outcome = answer(
        build(Family(kind, "", "", settings)), cells(f"kvpress:{name}"), Generate(prompt_ids=ids(60), max_new_tokens=2)
    )
    failure = outcome[0, f"kvpress:{name}"]
    assert isinstance(failure, Failure)
    assert said_ in failure.error


def long_rope() -> Any:
    """Its factors change beyond 64 tokens, by much."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = build(Family("phi3", "", "", {"rope_scaling": rope, "original_max_position_embeddings": 64}))
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            weight.data.mul_(3.0)
    return model


@pytest.mark.parametrize("chunk", [None, 32])
def test_factors_that_depend_on_the_length_are_those_of_the_document(chunk: int | None) -> None:
    """Beside a longer one, and read in chunks."""
    model, asked = long_rope(), cells("full", "mix", cache_size=48)
    requests = [Generate(prompt_ids=ids(length), max_new_tokens=12) for length in (40, 100, 48)]
    documents = [Document(id=str(place), request=request) for place, request in enumerate(requests)]
    engine = Engine(model, TOKENIZER, asked, batch_size=3, prefill_chunk=chunk)
    found = {
        (int(document.id), outcome.cell.method): outcome
        for document, outcome in engine.answer_batch([(each, asked) for each in documents])
    }
    for place, request in enumerate(requests):
        outcome = found[place, "full"]
        assert isinstance(outcome, Measurement), outcome
        assert list(outcome.answer.token_ids) == generated(model, request)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def without_a_cache(model: Any, request: Generate) -> list[int]:
    """Greedy decoding that reads all of the text for every token, with the factors of its length."""
    text = list(request.prompt_ids)
    with torch.inference_mode():
        for _ in range(request.max_new_tokens):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(request.prompt_ids) :]


@pytest.mark.parametrize("length", [56, 64])
def test_an_answer_that_crosses_the_length_is_read_anew_and_compressed_anew(length: int) -> None:
    model = long_rope()
    request = Generate(prompt_ids=ids(length), max_new_tokens=20)
    found = answer(model, cells("full", "mix", cache_size=48), request)
    full, mine = found[0, "full"], found[0, "mix"]
    assert isinstance(full, Measurement), full
    assert isinstance(mine, Measurement), mine
    assert list(full.answer.token_ids) == without_a_cache(model, request)
    assert full.tokens_original == mine.tokens_original + mine.tokens_quantized + mine.tokens_evicted == length + 19
    assert mine.tokens_original + mine.tokens_quantized <= 48
    held = answer(model, cells("mix", cache_size=200), request)[0, "mix"]
    assert isinstance(held, Measurement), held
    assert held.answer == full.answer


def test_given_texts_have_the_factors_of_their_whole_length() -> None:
    """Choices and windows that begin below the length and end beyond it, read through the cache."""
    model, text = long_rope(), ids(90)
    with torch.inference_mode():
        logits = model(torch.tensor([text[:-1]]), use_cache=False).logits[0].log_softmax(dim=-1)
    expected = logits[torch.arange(89), torch.tensor(text[1:])]
    choice = LogLikelihood(continuations=(Continuation(context_ids=text[:50], token_ids=text[50:]),))
    window = Rolling(windows=(Continuation(context_ids=text[:1], token_ids=text[1:]),), chunk=8)
    compare = Compare(context_ids=text[:50], continuation_ids=text[50:])
    found = answer(model, cells("full", "mix", cache_size=200), choice, window, compare)
    for method in ("full", "mix"):
        asked, read_, compared = (found[place, method] for place in range(3))
        assert isinstance(asked, Measurement), asked
        assert isinstance(read_, Measurement), read_
        assert isinstance(compared, Measurement), compared
        assert asked.answer.scored[0].log_likelihood == pytest.approx(float(expected[49:].sum()), abs=1e-3)
        assert read_.answer.scored[0].log_likelihood == pytest.approx(float(expected.sum()), abs=1e-3)
        assert max(compared.answer.kl) < 1e-5
