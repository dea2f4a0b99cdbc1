"""Every press against kvpress' own pipeline: a context is compressed, a question is read, then comes the answer."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from bench.engine.engine import Engine
from bench.methods.base import drawing_the_same
from bench.methods.cell import Cell
from bench.methods.grid import other_cell
from bench.methods.names import PRESSES, usable_presses
from bench.methods.presses import library, patched, plan_press, quiet, traceless
from bench.models.loading import load
from tasks.base import Document, Generate, Generated

if find_spec("kvpress") is None:
    pytest.skip("kvpress is not installed", allow_module_level=True)

CONTEXT, QUESTION, ANSWER, KEPT = 203, 9, 12, 61
NAMES = [
    *(name for name in usable_presses() if PRESSES[name].decodes is None),
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
    document = Document(id="d", request=Generate(**asked, max_new_tokens=ANSWER))
    (measured,) = Engine(tiny.model, tiny.tokenizer, [cell]).answer(document, [cell])
    assert isinstance(measured.answer, Generated)
    assert measured.tokens_evicted > 0
    return measured.answer.text


@pytest.mark.usefixtures("_answers_go_on")
@pytest.mark.parametrize("name", NAMES)
def test_the_same_answer(tiny: Any, name: str) -> None:
    name = f"kvpress:{name}"
    cell = other_cell(name, unit="tokens", cache_size=KEPT)
    # The pipeline reads a question in one forward. A press that compresses while it reads counts forwards; and where
    # layers hold unequally many tokens there is no mask for all.
    alone = plan_press(name).decodes or "kvcompose" in name or "window_size=16" in name
    context, question = ids(CONTEXT, 0), ids(1 if alone else QUESTION, 1)
    assert by_the_suite(tiny, cell, context, question) == by_the_pipeline(tiny, name, context, question)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["kvzip", "kvzip[kvzip_plus_normalization=true]", "adakv+expected_attention", "criticaladakv", "snapkv"],
)
def test_the_same_answer_of_the_default_model(default_model: Any, name: str) -> None:
    """Real weights, the context a text and the question about it in words."""
    tokenizer = default_model.tokenizer
    text = "".join(f"The code of {person} is {71 * place + 1000}. " for place, person in enumerate(_names()))
    context = tokenizer("Remember these codes. " + text, return_tensors="pt")["input_ids"]
    question = tokenizer("Question: what is the code of Nora? Answer: the code of Nora is", return_tensors="pt")
    name, kept = f"kvpress:{name}", context.shape[1] // 2
    cell = other_cell(name, unit="tokens", cache_size=kept)
    answers = [
        by(default_model, what, context, question["input_ids"])
        for by, what in ((by_the_suite, cell), (partial(by_the_pipeline, kept=kept), name))
    ]
    assert answers[0] == answers[1] != ""


def _names() -> list[str]:
    first = ("Ad", "Bet", "Clar", "Dor", "Em", "Flor", "Nor", "Ros", "Sus", "Vi")
    return [name + ending for ending in ("a", "ine", "ette") for name in first]


@pytest.fixture(scope="module")
def default_model() -> Any:
    # One reads a question at once, the other token by token: how bfloat16 rounds that hangs on the machine.
    return load("smollm2-135m", dtype="float32")
