"""Every press against kvpress' own pipeline: a context is compressed, a question is read, then comes the answer."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from bench.engine.engine import Engine, Measurement
from bench.methods.base import drawing_the_same
from bench.methods.cell import Cell
from bench.methods.grid import other_cell
from bench.methods.names import PRESSES, usable_presses
from bench.methods.presses import library, patched, plan_press, quiet, traceless
from bench.methods.reading import record
from bench.models.loading import load
from tasks.base import Document, Generate, Generated

if find_spec("kvpress") is None:
    pytest.skip("kvpress is not installed", allow_module_level=True)

CONTEXT, QUESTION, ANSWER, KEPT = 203, 9, 12, 61
NAMES = [
    *(name for name in usable_presses() if PRESSES[name].decodes is None and not PRESSES[name].divides),
    "adakv+expected_attention",
    "adakv[alpha_safeguard=0.05]+snapkv[window_size=24]",
    "criticalkv+expected_attention",
    "criticaladakv+expected_attention",
    "chunkkv[chunk_length=8]+tova",
    "kvzip[kvzip_plus_normalization=true]",
    "kvzip[layerwise=true;chunk_size=64]",
    "pyramidkv[beta=10;window_size=16]",
    "decoding[compression_interval=3]+knorm",
    "prefill_decoding[compression_interval=5]+snapkv[window_size=3]",
]


def ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 300, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _kvpress_is_imported() -> None:
    """By the suite and not by a test, whose import would patch transformers."""
    library("kvpress:snapkv")


@pytest.fixture
def _answers_go_on(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends an answer early."""
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", -1)


def by_the_pipeline(tiny: Any, name: str, context: torch.Tensor, question: torch.Tensor, kept: int = KEPT) -> str:
    from kvpress.pipeline import KVPressTextGenerationPipeline

    press = plan_press(name).press(context.shape[1], kept)
    pipeline = KVPressTextGenerationPipeline(model=tiny.model, tokenizer=tiny.tokenizer)
    asked = {"context_ids": context, "questions_ids": [question]}
    with traceless(tiny.model), patched(tiny.model), drawing_the_same(tiny.model), quiet(), torch.inference_mode():
        (answer,) = pipeline._forward(asked, max_new_tokens=ANSWER, press=press)
    return str(answer)


def by_the_suite(tiny: Any, cell: Cell, context: torch.Tensor, question: torch.Tensor) -> str:
    asked = {"prompt_ids": tuple(context[0].tolist()), "question_ids": tuple(question[0].tolist())}
    return answered(tiny, cell, Generate(**asked, max_new_tokens=ANSWER)).text


def answered(tiny: Any, cell: Cell, request: Generate) -> Generated:
    (measured,) = Engine(tiny.model, tiny.tokenizer, [cell]).answer(Document(id="d", request=request), [cell])
    assert isinstance(measured, Measurement), measured
    assert isinstance(measured.answer, Generated)
    assert measured.tokens_evicted > 0
    return measured.answer


def asks_a_token(name: str) -> bool:
    """The pipeline reads a question in one forward. A press that compresses while it reads counts forwards; and where
    layers hold unequally many tokens there is no mask for all."""
    return plan_press(name).decodes or "kvcompose" in name or "window_size=16" in name


@pytest.mark.usefixtures("_answers_go_on")
@pytest.mark.parametrize("name", NAMES)
def test_the_same_answer(tiny: Any, name: str) -> None:
    name = f"kvpress:{name}"
    cell = other_cell(name, unit="tokens", cache_size=KEPT)
    context, question = ids(CONTEXT, 0), ids(1 if asks_a_token(name) else QUESTION, 1)
    assert by_the_suite(tiny, cell, context, question) == by_the_pipeline(tiny, name, context, question)


def finch_by_the_pipeline(
    model: Any, tokenizer: Any, name: str, parts: tuple[torch.Tensor, torch.Tensor], kept: int, first: int
) -> tuple[str, list[Any]]:
    """The answer behind its ``first`` token, which stands for the question that the pipeline wants behind what it
    compresses, and the layers as the press leaves them: with kvpress' own delimiter between context and question."""
    from kvpress.pipeline import KVPressTextGenerationPipeline

    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    press = plan_press(name).press(sum(part.shape[1] for part in parts), kept, question=1)
    press.window_size = press.delimiter_token_id = None
    press.update_model_and_tokenizer(model, tokenizer)
    with_delimiter = torch.cat([parts[0], torch.tensor([[press.delimiter_token_id]]), parts[1]], dim=1)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    with quiet(), torch.inference_mode():
        cache = DynamicCache()
        with press(model):
            model.model(input_ids=with_delimiter, past_key_values=cache)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if press.rerotate_keys:
            asked = {"context_ids": with_delimiter, "questions_ids": [torch.tensor([[first]])]}
            (answer,) = pipeline._forward(asked, max_new_tokens=ANSWER - 1, press=press)
        else:
            # By itself it would count the delimiter, which nobody has read, to the positions.
            tokens = with_delimiter.shape[1] - 1
            answer = pipeline.generate_answer(torch.tensor([[first]]), cache, tokens, ANSWER - 1)
    return str(answer), layers


def same_as_with_a_delimiter(loaded: Any, name: str, context: torch.Tensor, question: torch.Tensor, kept: int) -> str:
    """The answer of the suite, once it is certain that it is the pipeline's and that the same tokens are kept."""
    name, asking = f"kvpress:{name}", question.shape[1]
    cell, prompt_ids = other_cell(name, unit="tokens", cache_size=kept), torch.cat([context, question], dim=1)
    ids = tuple(prompt_ids[0].tolist())
    answer = answered(loaded, cell, Generate(prompt_ids=ids, question_tokens=asking, max_new_tokens=ANSWER))
    first, *rest = answer.token_ids
    model, tokenizer = loaded.model, loaded.tokenizer
    expected, layers = finch_by_the_pipeline(model, tokenizer, name, (context, question), kept, first)
    assert tokenizer.decode(rest, skip_special_tokens=True) == expected
    with torch.inference_mode():
        (prompt,) = record(model, [ids], cell.recorded_queries)
        cache = cell.compress(model, replace(prompt, question=asking)).cache
    for layer, (keys, values) in zip(cache.layers, layers, strict=True):
        # Of chunks whole numbers stay.
        assert kept - 3 < keys.shape[2] <= kept
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    return answer.text


@pytest.mark.usefixtures("_answers_go_on")
@pytest.mark.parametrize(
    "name", ["finch", "finch[rerotate_keys=false]", "finch[normalize_scores=false]", "finch[chunk_length=101]"]
)
def test_finch_is_told_what_its_delimiter_tells(tiny: Any, name: str) -> None:
    same_as_with_a_delimiter(tiny, name, ids(CONTEXT - QUESTION, 0), ids(QUESTION, 1), KEPT)


@pytest.mark.slow
def test_finch_is_told_it_with_the_default_model(default_model: Any) -> None:
    context, question = codes(default_model.tokenizer)
    kept = (context.shape[1] + question.shape[1]) // 2
    assert same_as_with_a_delimiter(default_model, "finch", context, question, kept)


WITH_WEIGHTS = [
    *("adakv", "adakv+expected_attention", "block", "cap", "chunk", "chunkkv", "compactor", "criticaladakv"),
    *("criticalkv", "expected_attention", "keydiff", "kvzip", "kvzip[kvzip_plus_normalization=true]", "snapkv"),
    "tova",
]
"""Those that are compared on real weights too."""


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_the_same_answer_of_the_default_model(default_model: Any, name: str) -> None:
    """Real weights, the context a text and the question about it in words."""
    context, question = codes(default_model.tokenizer)
    name, kept = f"kvpress:{name}", context.shape[1] // 2
    cell = other_cell(name, unit="tokens", cache_size=kept)
    answers = [
        by(default_model, what, context, question)
        for by, what in ((by_the_suite, cell), (partial(by_the_pipeline, kept=kept), name))
    ]
    assert answers[0] == answers[1] != ""


def codes(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [1, N] of a context and of a question about it."""
    text = "".join(f"The code of {person} is {71 * place + 1000}. " for place, person in enumerate(_names()))
    asked = "Question: what is the code of Nora? Answer: the code of Nora is"
    context, question = (
        tokenizer(part, return_tensors="pt")["input_ids"] for part in (f"Remember these codes. {text}", asked)
    )
    return context, question


def _names() -> list[str]:
    first = ("Ad", "Bet", "Clar", "Dor", "Em", "Flor", "Nor", "Ros", "Sus", "Vi")
    return [name + ending for ending in ("a", "ine", "ette") for name in first]


@pytest.fixture(scope="module")
def default_model() -> Any:
    # One reads a question at once, the other token by token: how bfloat16 rounds that hangs on the machine.
    return load("smollm2-135m", dtype="float32")
