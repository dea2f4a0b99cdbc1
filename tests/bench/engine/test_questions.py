"""Questions behind a compressed context: read through what is left of it, and of one context computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from arkv import TriStateCache
from bench.engine.engine import Engine, Failure, Measurement
from bench.engine.steps import Steps
from bench.methods.cell import Cell
from bench.methods.grid import grid
from bench.runs.executors.base import batches
from tasks.base import Continuation, Document, Generate, LogLikelihood
from tests.bench.engine.test_engine import cells, forwards, generated, plain_scores

CONTEXT = 120


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def asking(number: int, *, context: int = 0, length: int = 0) -> Document:
    request = Generate(
        prompt_ids=ids(CONTEXT, context), question_ids=ids(length or 5 + number, 100 + number), max_new_tokens=6
    )
    return Document(id=f"c{context}-q{number}", request=request)


def inside(document: Document) -> Document:
    """The same tokens as one prompt."""
    request = document.request
    assert isinstance(request, Generate)
    return replace(document, request=replace(request, prompt_ids=request.input_ids, question_ids=()))


def answers(
    tiny: Any, grid_: list[Cell], documents: list[Document], size: int | None = 1
) -> dict[tuple[str, str], Measurement]:
    engine = Engine(tiny.model, tiny.tokenizer, grid_, batch_size=size)
    found = list(engine.answer_batch([(document, grid_) for document in documents]))
    assert not [item.error for _, item in found if isinstance(item, Failure)]
    return {(question.id, item.cell.method): item for question, item in found if isinstance(item, Measurement)}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The methods of the compressions under this."""
    done: list[str] = []
    compress = Steps.compress

    def counting(self: Steps, cell: Cell, prompt: Any, beside: Any) -> Any:
        done.append(cell.method)
        return compress(self, cell, prompt, beside)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "compress", counting)
        yield done


@pytest.mark.parametrize("size", [1, 2, 8, None])
def test_four_questions_cost_one_prefill_and_one_compression_per_method(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    questions = [asking(number) for number in range(4)]
    alone = [answers(tiny, cells(), [question]) for question in questions]
    shapes, handle = forwards(tiny)
    try:
        with counted(monkeypatch) as compressed:
            together = answers(tiny, cells(), questions, size)
    finally:
        handle.remove()
    assert sorted(compressed) == sorted(["full", "window", "origin", "quant", "mix"])
    assert [shape for shape in shapes if shape[1] == CONTEXT] == [(1, CONTEXT)]
    # Each is answered as if it had been the only one.
    for mine in alone:
        for key, measured in mine.items():
            assert together[key].answer == measured.answer
            assert together[key].kv_bytes == measured.kv_bytes
            assert together[key].tokens_evicted == measured.tokens_evicted


def test_a_context_that_is_read_twice_is_so_once_for_four_questions(tiny: Any) -> None:
    twice = grid(["mix-replay"], [{"cache_ratio": 0.25}], [8], None, {"budget_unit": "bytes"})
    readings = []
    for count in (1, 4):
        shapes, handle = forwards(tiny)
        try:
            answers(tiny, twice, [asking(number) for number in range(count)])
        finally:
            handle.remove()
        readings.append([shape for shape in shapes if shape[1] > 20])
    assert readings[0] == readings[1]
    assert len(readings[0]) == 2


def test_the_weights_of_the_head_are_copied_for_no_row(tiny: Any) -> None:
    """Torch copies them for each row of a batch whose last tokens do not lie in one piece."""
    head = tiny.model.get_output_embeddings()
    pieces: list[tuple[int, bool]] = []
    watching = head.register_forward_hook(
        lambda _, inputs, __: pieces.append((len(inputs[0]), inputs[0].is_contiguous()))
    )
    try:
        answers(tiny, cells(), [asking(number) for number in range(4)], 4)
    finally:
        watching.remove()
    assert {rows for rows, _ in pieces} == {1, 4}
    assert all(whole for rows, whole in pieces if rows > 1)
    assert not head._forward_pre_hooks


def test_a_context_of_many_questions_is_one_batch_and_others_are_not(tiny: Any) -> None:
    documents = [asking(number, context=context) for number in range(3) for context in range(2)]
    work = [(document, ()) for document in documents]
    found = [[document.id for document, _ in batch] for batch in batches(work, 1)]
    assert found == [[f"c{context}-q{number}" for number in range(3)] for context in range(2)]
    # Prompts with the question inside stay apart, whatever they hold.
    assert [len(batch) for batch in batches([(inside(document), ()) for document in documents], 2)] == [2, 2, 2]
    # What a kill costs is bounded.
    assert [len(batch) for batch in batches([(asking(n), ()) for n in range(70)], 1)] == [32, 32, 6]


@pytest.mark.parametrize("seed", range(3))
def test_full_answers_as_if_the_question_were_inside(tiny: Any, seed: int) -> None:
    question = asking(seed, context=seed)
    measured = answers(tiny, cells("mix", "full"), [question])[question.id, "full"]
    assert list(measured.answer.token_ids) == generated(tiny, inside(question))
    assert measured.prompt_tokens == CONTEXT + 5 + seed
    assert measured.context_tokens == CONTEXT
    assert measured.tokens_original == measured.prompt_tokens + measured.generated_tokens - 1


def test_the_question_is_no_part_of_what_is_compressed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    original = TriStateCache.from_prefill.__func__  # type: ignore[attr-defined]

    def spy(cls: type, prefill: Any, config: Any) -> TriStateCache:
        prompts.append(prefill.get_seq_length())
        return original(cls, prefill, config)

    monkeypatch.setattr(TriStateCache, "from_prefill", classmethod(spy))
    first, second = (answers(tiny, cells("mix"), [question]) for question in (asking(1), inside(asking(1))))
    assert prompts == [CONTEXT, CONTEXT + 6]
    # The cache keeps to its budget while the question is read, and while it is answered.
    for measured in (*first.values(), *second.values()):
        assert measured.tokens_original + measured.tokens_quantized == pytest.approx(64)


@pytest.mark.parametrize("in_blocks", [True, False])
def test_caches_that_are_read_as_they_decode_read_a_question_token_by_token(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, in_blocks: bool
) -> None:
    question = asking(2)
    monkeypatch.setattr(Cell, "reads_blocks", lambda self, cache: in_blocks)
    shapes, handle = forwards(tiny)
    try:
        measured = answers(tiny, cells("window"), [question])[question.id, "window"]
    finally:
        handle.remove()
    read = [(1, 7)] if in_blocks else [(1, 1)] * 7
    assert shapes == [(1, CONTEXT), *read, *[(1, 1)] * (measured.generated_tokens - 1)]


def test_times_say_what_the_question_took(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stopwatch shows one second: prefill and compression are shared by three, the rest is each one's own."""
    monkeypatch.setattr("bench.telemetry.Stopwatch.__exit__", lambda self, *_: setattr(self, "seconds", 1.0))
    found = answers(tiny, cells("window"), [asking(number) for number in range(3)])
    for measured in found.values():
        assert measured.prefill_s == pytest.approx(1 / 3)
        assert measured.question_s == 1.0
        assert measured.ttft_ms == pytest.approx(1000 * (measured.prefill_s + measured.compress_s + 1.0 + 1.0))
    (plain,) = answers(tiny, cells("window"), [inside(asking(1))]).values()
    assert plain.question_s is None


def test_settings_of_generation_see_the_question(tiny: Any) -> None:
    """A penalty of what has been said counts the tokens of the question too."""
    question = asking(1, length=30)
    assert isinstance(question.request, Generate)
    settings = {"no_repeat_ngram_size": 1}
    question = replace(question, request=replace(question.request, generation=settings))
    after, before = (
        answers(tiny, cells("full"), [item])[item.id, "full"].answer for item in (question, inside(question))
    )
    assert after == before
    assert not set(after.token_ids) & set(question.request.input_ids)


# --- Continuations ---


def choosing(number: int, *, tokens: tuple[tuple[int, ...], ...] = ((7,), (8, 9), (8, 10))) -> Document:
    items = [
        Continuation(context_ids=ids(CONTEXT, 0), question_ids=ids(4 + number, 50 + number), token_ids=choice)
        for choice in tokens
    ]
    return Document(id=f"choice{number}", request=LogLikelihood(continuations=tuple(items)))


@pytest.mark.parametrize("size", [1, 3])
def test_choices_of_several_questions_are_read_behind_one_context(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    questions = [choosing(number) for number in range(3)]
    shapes, handle = forwards(tiny)
    try:
        with counted(monkeypatch) as compressed:
            found = answers(tiny, cells("full", "mix", cache_size=512), questions, size)
    finally:
        handle.remove()
    assert sorted(compressed) == ["full", "mix"]
    assert [shape for shape in shapes if shape[1] >= CONTEXT - 1] == [(1, CONTEXT)]
    for question in questions:
        for method in ("full", "mix"):
            measured = found[question.id, method]
            assert (measured.prefills, measured.context_tokens) == (1, CONTEXT)
            for got, item in zip(measured.answer.scored, question.request.continuations, strict=True):
                likelihood, greedy = plain_scores(tiny, item.context_ids + item.question_ids, item.token_ids)
                assert got.log_likelihood == pytest.approx(likelihood, abs=1e-4)
                assert got.is_greedy == greedy


def test_choices_read_through_a_small_cache_differ_from_the_full_ones(tiny: Any) -> None:
    question = choosing(1)
    found = answers(tiny, cells("full", "window", cache_size=16), [question])
    full, window = ([item.log_likelihood for item in m.answer.scored] for m in found.values())
    assert window != pytest.approx(full, abs=1e-3)
    assert found[question.id, "window"].tokens_original == pytest.approx(16)


# --- Turns ---


def chatting(*, turns: int = 2, end_ids: tuple[int, ...] = ()) -> Document:
    request = Generate(
        prompt_ids=ids(CONTEXT, 0),
        question_ids=ids(6, 100),
        turns=tuple(ids(5 + turn, 200 + turn) for turn in range(turns)),
        max_new_tokens=5,
        end_ids=end_ids,
    )
    return Document(id="chat", request=request)


def step_by_step(tiny: Any, question: Document, ends: set[int]) -> list[list[int]]:
    """What the model answers to each question, every time fed all that went before."""
    request = question.request
    assert isinstance(request, Generate)
    said, answers = request.input_ids, []
    for turn in (*request.turns, ()):
        prompt = Document(id="d", request=Generate(prompt_ids=said, max_new_tokens=5, end_ids=request.end_ids))
        (measured,) = answers_of(tiny, prompt)
        tokens = list(measured.answer.token_ids)
        answers.append(tokens)
        said += tuple(tokens[:-1] if tokens[-1] in ends else tokens) + turn
    return answers


def answers_of(tiny: Any, document: Document) -> list[Measurement]:
    return list(answers(tiny, cells("full"), [document]).values())


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_each_turn_is_answered_from_all_that_went_before(tiny: Any, ends: bool, size: int) -> None:
    question = chatting()
    end_ids: tuple[int, ...] = ()
    if ends:
        # A token of the first answer, which then ends there and is not read.
        end_ids = (step_by_step(tiny, question, set())[0][1],)
        question = chatting(end_ids=end_ids)
    all_ends = {*end_ids, tiny.tokenizer.eos_token_id}
    expected = step_by_step(tiny, question, all_ends)
    assert ends == (end_ids == tuple(expected[0][-1:]))
    grid_ = cells("full", "window", "mix", cache_size=512)
    twin = replace(question, id="twin")
    found = answers(tiny, grid_, [question, twin], size)
    assert len(found) == 6
    for measured in found.values():
        assert [token for answer in expected for token in answer] == list(measured.answer.token_ids)
        assert len(measured.answer.turns) == measured.answers == 3
        assert measured.answer.text == "\n".join(measured.answer.turns)
        seen = measured.prompt_tokens + measured.generated_tokens
        # The last token is not read, nor are those that end an answer.
        unread = sum(answer[-1] in all_ends for answer in expected[:-1])
        assert measured.tokens_original == seen - 1 - unread


def test_a_chat_keeps_to_its_budget(tiny: Any) -> None:
    for measured in answers(tiny, cells("window", "mix"), [chatting(turns=3)]).values():
        assert measured.tokens_original + measured.tokens_quantized == pytest.approx(64)
        assert measured.answers == 4
        assert measured.generated_tokens > 10


def test_times_of_turns(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stopwatch shows one second: three questions, and each later token of an answer."""
    monkeypatch.setattr("bench.telemetry.Stopwatch.__exit__", lambda self, *_: setattr(self, "seconds", 1.0))
    (measured,) = answers(tiny, cells("full"), [chatting()]).values()
    assert measured.question_s == 3.0
    assert measured.ttft_ms == pytest.approx(1000 * (measured.prefill_s + measured.compress_s + 2.0))
    assert measured.decode_s == measured.generated_tokens - 3
    assert measured.tpot_ms == 1000.0
