"""One prefill per document, answers as the model alone would give them, and true bytes."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from arkv import PrefillCache, TriStateCache, attach
from bench.engine import generation
from bench.engine.engine import Engine, Failure, Measurement
from bench.engine.jobs import Job
from bench.engine.steps import Steps
from bench.methods.cell import Cell
from bench.methods.grid import grid
from bench.methods.reading import record
from tasks.base import Compare, Compared, Continuation, Document, Generate, Generated, LogLikelihood, Rolling

METHODS = ["full", "window", "origin", "quant", "mix"]


def cells(*methods: str, cache_size: int = 64) -> list[Cell]:
    return grid(methods or METHODS, [{"cache_size": cache_size}], [8], ["int8"], {})


def document(length: int = 200, new: int = 12, seed: int = 0, stop: tuple[str, ...] = ()) -> Document:
    ids = torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Document(id=f"d{seed}", request=Generate(prompt_ids=tuple(ids), max_new_tokens=new, stop=stop))


def answer(tiny: Any, grid_: list[Cell], question: Document) -> list[Measurement]:
    return measured_only(Engine(tiny.model, tiny.tokenizer, grid_).answer(question, grid_))


def measured_only(outcomes: Iterable[Measurement | Failure]) -> list[Measurement]:
    found = list(outcomes)
    assert not [item.error for item in found if isinstance(item, Failure)]
    return [item for item in found if isinstance(item, Measurement)]


def generated(tiny: Any, question: Document) -> list[int]:
    """What transformers' own greedy generation answers."""
    ids = torch.tensor([question.request.prompt_ids])
    output = tiny.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=question.request.max_new_tokens, do_sample=False
    )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("count", [1, 5])
def test_a_prompt_is_computed_once_for_all_methods(tiny: Any, count: int) -> None:
    lengths = []
    handle = tiny.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    try:
        measured = answer(tiny, cells(*METHODS[:count]), document())
    finally:
        handle.remove()
    assert len(measured) == count
    assert [length for length in lengths if length > 1] == [200]
    assert lengths.count(1) == sum(m.generated_tokens - 1 for m in measured)
    assert len({m.prefill_s for m in measured}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_full_answers_as_the_model_alone(tiny: Any, seed: int) -> None:
    question = document(seed=seed, new=24)
    before = tiny.model.config._attn_implementation
    # Behind other methods: none of them may change what the prefill holds.
    last = answer(tiny, cells("mix", "window", "full"), question)[-1]
    assert last.cell.method == "full"
    assert list(last.answer.token_ids) == generated(tiny, question)
    assert tiny.model.config._attn_implementation == before


def test_a_budget_that_holds_everything_changes_nothing(tiny: Any) -> None:
    question = document()
    expected = tuple(generated(tiny, question))
    for measured in answer(tiny, cells(cache_size=256), question):
        assert measured.answer.token_ids == expected
        assert measured.tokens_evicted == measured.tokens_quantized == 0


def test_cells_are_answered_in_the_order_given(tiny: Any) -> None:
    order = cells("mix", "full", "origin")
    assert [m.cell for m in answer(tiny, order, document())] == order


def reachable_bytes(*roots: Any) -> int:
    """Bytes of all tensor storage that the garbage collector can reach: shares no code with the library's count."""
    storages, seen, stack = {}, set(), list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType | torch.nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        else:
            stack.extend(gc.get_referents(item))
    return sum(storages.values())


def test_bytes_are_all_that_the_cache_holds(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    original = TriStateCache.from_prefill.__func__  # type: ignore[attr-defined]

    def spy(cls: type, *arguments: Any) -> TriStateCache:
        caches.append(original(cls, *arguments))
        return caches[-1]

    monkeypatch.setattr(TriStateCache, "from_prefill", classmethod(spy))
    full, *measured = answer(tiny, cells(), document())
    # 2 layers, keys and values, 2 heads of 16 in float32.
    assert full.kv_bytes == full.full_kv_bytes == (200 + full.generated_tokens - 1) * 2 * 2 * 2 * 16 * 4
    assert len(measured) == len(caches) == 4
    for item, cache in zip(measured, caches, strict=True):
        assert item.kv_bytes == reachable_bytes(cache) > 0
        assert item.kv_bytes <= item.kv_bytes_peak
        assert item.full_kv_bytes == (200 + item.generated_tokens - 1) * 2 * 2 * 2 * 16 * 4
        assert item.kv_bytes < 0.5 * item.full_kv_bytes


def test_states_add_up_to_the_tokens_seen(tiny: Any) -> None:
    for measured in answer(tiny, cells(), document()):
        seen = 200 + measured.generated_tokens - 1
        total = measured.tokens_original + measured.tokens_quantized + measured.tokens_evicted
        assert total == pytest.approx(seen)
        if measured.cell.method != "full":
            assert measured.tokens_original + measured.tokens_quantized == pytest.approx(64)


def test_stop_strings_end_the_answer_and_are_cut_off(tiny: Any) -> None:
    question = document(new=24)
    (plain,) = answer(tiny, cells("full"), question)
    text = plain.answer.text
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    (stopped,) = answer(tiny, cells("full"), document(new=24, stop=("\0never", middle)))
    assert stopped.answer.text == text.split(middle)[0]
    assert stopped.generated_tokens < plain.generated_tokens
    # The empty string is in every text.
    (first,) = answer(tiny, cells("full"), document(new=24, stop=("",)))
    assert first.answer.token_ids == plain.answer.token_ids[:1]
    assert text.startswith(first.answer.text)


def test_the_end_token_ends_the_answer(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = generated(tiny, document(new=24))
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [tokens[5], 399])
    (measured,) = answer(tiny, cells("full"), document(new=24))
    assert list(measured.answer.token_ids) == tokens[: tokens.index(tokens[5]) + 1]


@pytest.mark.parametrize("place", [0, 3])
def test_further_ends_are_those_of_generate(tiny: Any, place: int) -> None:
    question = document()
    end = generated(tiny, question)[place]
    question = replace(question, request=replace(question.request, end_ids=(end,)))
    (measured,) = answer(tiny, cells("full"), question)
    ids = torch.tensor([question.request.prompt_ids])
    expected = tiny.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=question.request.max_new_tokens,
        min_new_tokens=1,
        eos_token_id=[tiny.tokenizer.eos_token_id, end],
        do_sample=False,
    )[0, ids.shape[1] :].tolist()
    assert list(measured.answer.token_ids) == expected
    assert expected[0] != end
    assert (end in expected) == (place > 0)


def test_scores_that_cells_share_count_for_each(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had been answered alone."""
    score = PrefillCache.score
    asked = []

    def slow(self: PrefillCache, config: Any) -> None:
        if config.scoring not in asked:
            asked.append(config.scoring)
            time.sleep(0.2)
        score(self, config)

    monkeypatch.setattr(PrefillCache, "score", slow)
    _, *others = answer(tiny, cells("window", "origin", "quant", "mix"), document(new=2))
    assert len(asked) == 3
    assert all(measured.compress_s >= 0.2 for measured in others)


def test_times_are_those_of_the_parts(tiny: Any) -> None:
    for measured in answer(tiny, cells("full", "mix"), document()):
        assert measured.ttft_ms >= 1000 * (measured.prefill_s + measured.compress_s)
        assert measured.tpot_ms == pytest.approx(1000 * measured.decode_s / (measured.generated_tokens - 1))
        assert measured.decode_tokens_per_s == pytest.approx(1000 / measured.tpot_ms)
        assert measured.peak_memory_bytes is None, "unknown on a CPU"
    (single,) = answer(tiny, cells("full"), document(new=1))
    assert (single.generated_tokens, single.tpot_ms, single.decode_tokens_per_s) == (1, None, None)


@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        ({"cache_size": 512}, {}),
        ({"cache_size": 1024}, {"budget_unit": "bytes"}),
        ({"cache_ratio": 0.25}, {"budget_unit": "bytes"}),
        ({"cache_ratio": 1.0}, {}),
    ],
    ids=str,
)
def test_the_warm_up_compresses(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any], settings: dict[str, Any]
) -> None:
    """With every cell, whatever its budget: else the first document would pay for what compression sets up once."""
    grid_ = grid([*METHODS, "kvpress:knorm"], [budget], [], None, settings)
    outcomes: list[Measurement | Failure] = []
    original = Engine.answer

    def noted(self: Engine, *arguments: Any) -> Any:
        for outcome in original(self, *arguments):
            outcomes.append(outcome)
            yield outcome

    monkeypatch.setattr(Engine, "answer", noted)
    said = Engine(tiny.model, tiny.tokenizer, grid_).warm_up()
    assert said.startswith("a prompt of ")
    assert "not compressed" not in said
    compressed = {item.cell.method: item.tokens_quantized + item.tokens_evicted for item in measured_only(outcomes)}
    assert list(compressed) == [*METHODS, "kvpress:knorm"]
    assert compressed.pop("full") == 0
    assert min(compressed.values()) > 50


def test_a_warm_up_names_who_compressed_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_ = grid(["full", "origin"], [{"cache_size": 512}], [], None, {})
    monkeypatch.setattr(type(grid_[0]), "resized", lambda self, cache_size: self)
    assert "; not compressed: origin" in Engine(tiny.model, tiny.tokenizer, grid_).warm_up()


# --- Scoring given texts ---


def ids(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def choices(*pairs: tuple[tuple[int, ...], tuple[int, ...]]) -> Document:
    request = LogLikelihood(continuations=tuple(Continuation(context_ids=c, token_ids=t) for c, t in pairs))
    return Document(id="choices", request=request)


def score(tiny: Any, grid_: list[Cell], question: Document, batch_size: int | None = 1) -> list[Measurement]:
    return measured_only(Engine(tiny.model, tiny.tokenizer, grid_, batch_size=batch_size).answer(question, grid_))


def sums(measured: Measurement) -> list[float]:
    return [item.log_likelihood for item in measured.answer.scored]


def plain_scores(tiny: Any, context: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[float, bool]:
    """One forward without a cache."""
    with torch.no_grad():
        logits = tiny.model(torch.tensor([context + tokens[:-1]])).logits[0, -len(tokens) :]
    wanted = torch.tensor(tokens)[:, None]
    return float(logits.log_softmax(-1).gather(1, wanted).sum()), bool((logits.argmax(-1) == wanted[:, 0]).all())


MIXED = choices(
    *[(ids(200), tokens) for tokens in ((7,), (8,), (9, 10), (9, 10, 11), (9, 10, 12), (13,) * 8)],
    *[(ids(150, seed=1), (7, 8)), ((0,), (7, 8))],
)
"""Two contexts and one of a single token; continuations of several lengths, two of which differ in their last token."""


def forwards(tiny: Any) -> tuple[list[tuple[int, int]], Any]:
    """Shapes [B, T] of the inputs of every forward from now on, and the handle that ends it."""
    shapes: list[tuple[int, int]] = []
    handle = tiny.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape)),
        with_kwargs=True,
    )
    return shapes, handle


def test_a_four_choice_question_costs_one_prefill(tiny: Any) -> None:
    shapes, handle = forwards(tiny)
    try:
        measured = score(tiny, cells(), choices(*[(ids(200), (token,)) for token in (5, 6, 7, 8)]))
    finally:
        handle.remove()
    assert shapes == [(1, 199)] + [(1, 1)] * 5
    assert {m.prefills for m in measured} == {1}
    assert {m.scored_tokens for m in measured} == {4}
    assert len({m.prefill_s for m in measured}) == 1


@pytest.mark.parametrize(("batch_size", "reads"), [(1, 5), (2, 3), (8, 1), (None, 1)])
def test_continuations_are_read_in_batches(tiny: Any, batch_size: int | None, reads: int) -> None:
    shapes, handle = forwards(tiny)
    same = (
        *MIXED.request.continuations[:6],
        *choices((ids(200), (1, 2)), (ids(200), (3, 4, 5, 6))).request.continuations,
    )
    try:
        (measured,) = score(
            tiny, cells("full"), Document(id="d", request=LogLikelihood(continuations=same)), batch_size
        )
    finally:
        handle.remove()
    # Beside the prefill and the context's last token; the two that differ in their last token share a row.
    assert len(shapes) - 2 == reads
    assert measured.prefills == 1


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_full_scores_as_the_model_alone(tiny: Any, batch_size: int) -> None:
    *_, measured = score(tiny, cells("mix", "full"), MIXED, batch_size)
    assert measured.prefills == 3
    for got, item in zip(measured.answer.scored, MIXED.request.continuations, strict=True):
        likelihood, greedy = plain_scores(tiny, item.context_ids, item.token_ids)
        assert got.log_likelihood == pytest.approx(likelihood, abs=1e-4)
        assert got.is_greedy == greedy


def test_what_greedy_decoding_writes_is_greedy(tiny: Any) -> None:
    tokens = tuple(generated(tiny, document(new=5)))
    (measured,) = score(tiny, cells("full"), choices((ids(200), tokens), (ids(200), (*tokens[:-1], 1))))
    assert [item.is_greedy for item in measured.answer.scored] == [True, False]


def test_every_score_comes_from_the_compressed_cache(tiny: Any) -> None:
    full, *others = score(tiny, cells(), MIXED)
    for measured in others:
        differences = [abs(a - b) > 1e-3 for a, b in zip(sums(measured), sums(full), strict=True)]
        # All but the last one, whose context has nothing to compress.
        assert differences == [True] * 7 + [False]
        assert measured.tokens_evicted > 0
        assert measured.kv_bytes < 0.6 * measured.full_kv_bytes
    for measured in score(tiny, cells(cache_size=256), MIXED):
        assert sums(measured) == pytest.approx(sums(full), abs=1e-4)
        assert measured.tokens_evicted == measured.tokens_quantized == 0


def test_scores_do_not_depend_on_the_batch_size(tiny: Any) -> None:
    for one, many in zip(score(tiny, cells(), MIXED), score(tiny, cells(), MIXED, batch_size=8), strict=True):
        assert sums(one) == pytest.approx(sums(many), abs=1e-4)
        assert (one.kv_bytes, one.tokens_evicted) == (many.kv_bytes, many.tokens_evicted)


def text(share: float = 0.5, chunk: int = 32, length: int = 200) -> Document:
    """Two windows: 150 tokens behind the one before the text, then the rest with as much context as fits."""
    tokens = (0, *ids(length))
    windows = (
        Continuation(context_ids=tokens[:1], token_ids=tokens[1:151]),
        Continuation(context_ids=tokens[length - 150 : 151], token_ids=tokens[151:]),
    )
    return Document(id="text", request=Rolling(windows=windows, prefill_share=share, chunk=chunk))


@pytest.mark.parametrize(("share", "chunk"), [(0.0, 1), (0.5, 32), (0.99, 32), (0.3, 1000)])
def test_full_scores_texts_as_the_model_alone(tiny: Any, share: float, chunk: int) -> None:
    question = text(share, chunk)
    *_, measured = score(tiny, cells("mix", "full"), question)
    wanted = [plain_scores(tiny, w.context_ids, w.token_ids)[0] for w in question.request.windows]
    assert sums(measured) == pytest.approx(wanted, abs=1e-3)
    assert (measured.scored_tokens, measured.prefills) == (200, 2)


@pytest.mark.parametrize(("methods", "chunk"), [(("full", "mix"), 1), (METHODS, 32)])
def test_texts_are_read_through_the_compressed_cache(tiny: Any, methods: Sequence[str], chunk: int) -> None:
    full, *others = score(tiny, cells(*methods), text(chunk=chunk))
    for measured in others:
        assert all(abs(a - b) > 1e-2 for a, b in zip(sums(measured), sums(full), strict=True))
        assert measured.tokens_evicted > 0
        seen = measured.tokens_original + measured.tokens_quantized + measured.tokens_evicted
        assert seen == pytest.approx(150)
    for measured in score(tiny, cells(*methods[1:], cache_size=256), text(chunk=chunk)):
        assert sums(measured) == pytest.approx(sums(full), abs=1e-3)


def test_the_prompt_of_a_window_is_scored_as_it_is(tiny: Any) -> None:
    """With all but one token in the prompt only that one's score can differ."""
    full, origin = score(tiny, cells("full", "origin"), text(share=0.999))
    near = score(tiny, cells("full", "origin"), text(share=0.5))
    assert abs(sums(origin)[0] - sums(full)[0]) < abs(sums(near[1])[0] - sums(near[0])[0])


def test_a_text_of_one_token(tiny: Any) -> None:
    request = Rolling(windows=(Continuation(context_ids=(0,), token_ids=(5,)),))
    for measured in score(tiny, cells(), Document(id="d", request=request)):
        assert sums(measured) == pytest.approx([plain_scores(tiny, (0,), (5,))[0]], abs=1e-5)


def test_stop_strings_count_behind_the_thinking_only(tiny: Any) -> None:
    (plain,) = answer(tiny, cells("full"), document(new=24))
    pieces = [tiny.tokenizer.decode([token]) for token in plain.answer.token_ids]
    # The stop string stands before what ends the thinking, where it must not count.
    end = next(piece for piece in pieces[8:] if pieces.count(piece) == 1)
    stop = pieces[2]
    request = Generate(prompt_ids=document().request.prompt_ids, max_new_tokens=24, stop=(stop,), think_end=end)
    (thinking,) = answer(tiny, cells("full"), Document(id="d", request=request))
    wanted = plain.answer.text.split(end)[-1].lstrip().split(stop)[0]
    assert thinking.answer.text == wanted
    assert thinking.generated_tokens > pieces.index(end)


# --- Distributions ---


def comparison(context: int = 150, continuation: int = 20) -> Document:
    tokens = ids(context + continuation)
    return Document(id="d", request=Compare(context_ids=tokens[:context], continuation_ids=tokens[context:]))


def test_distributions_are_compared_token_by_token(tiny: Any) -> None:
    question = comparison()
    tokens = torch.tensor([question.request.context_ids + question.request.continuation_ids])
    full, mix = score(tiny, cells("full", "mix"), question)
    assert set(full.answer.kl) == set(full.answer.delta_nll) == {0.0}
    assert all(full.answer.agrees)
    # The same with the library alone.
    cache = TriStateCache(tiny.model, mix.cell.cache_config)
    with torch.no_grad():
        plain = tiny.model(tokens).logits[0, 149:-1].log_softmax(-1)
        with attach(tiny.model):
            tiny.model(tokens[:, :149], past_key_values=cache)
            steps = [tiny.model(tokens[:, i : i + 1], past_key_values=cache).logits[0, 0] for i in range(149, 169)]
    mine = torch.stack(steps).log_softmax(-1)
    kl = torch.nn.functional.kl_div(mine, plain, log_target=True, reduction="none").sum(-1)
    assert mix.answer.kl == pytest.approx(kl.tolist(), abs=1e-4)
    assert min(mix.answer.kl) > 1e-3
    assert mix.answer.agrees == tuple((plain.argmax(-1) == mine.argmax(-1)).tolist())
    wanted = tokens[0, 150:, None]
    assert mix.answer.delta_nll == pytest.approx((plain - mine).gather(1, wanted)[:, 0].tolist(), abs=1e-4)
    assert mix.tokens_original + mix.tokens_quantized + mix.tokens_evicted == pytest.approx(169)


def test_distributions_without_compression_are_those_of_the_full_cache(tiny: Any) -> None:
    # `full` need not be asked for to be compared with.
    for measured in score(tiny, cells("window", "origin", "quant", "mix", cache_size=256), comparison()):
        assert max(map(abs, measured.answer.kl)) < 1e-6
        assert all(measured.answer.agrees)


def test_the_attention_of_every_layer_is_compared(tiny: Any) -> None:
    """Against outputs recorded by hand, token by token, through the library alone."""
    plain = comparison()
    question = Document(id="d", request=replace(plain.request, per_layer=True))
    full, mix, press = score(tiny, [*cells("full", "mix"), *peer_cells("kvpress:snapkv")[1:]], question)
    assert full.answer.attention_error == (0.0, 0.0)
    assert len(press.answer.attention_error) == 2
    assert min(press.answer.attention_error) > 0.01
    tokens = torch.tensor([plain.request.context_ids + plain.request.continuation_ids])
    outputs: dict[str, list[torch.Tensor]] = {"full": [], "mix": []}
    for name, cache in (("full", DynamicCache()), ("mix", TriStateCache(tiny.model, mix.cell.cache_config))):
        with torch.no_grad(), attach(tiny.model):
            tiny.model(tokens[:, :149], past_key_values=cache)
            for layer in tiny.model.model.layers:
                layer.self_attn.o_proj.register_forward_hook(
                    lambda *call, name=name: outputs[name].append(call[2][0, 0])
                )
            for i in range(149, 169):
                tiny.model(tokens[:, i : i + 1], past_key_values=cache)
            for layer in tiny.model.model.layers:
                layer.self_attn.o_proj._forward_hooks.clear()
    exact, mine = (torch.stack(outputs[name]).unflatten(0, (20, 2)) for name in ("full", "mix"))
    wanted = ((mine - exact).norm(dim=-1) / exact.norm(dim=-1)).mean(dim=0)
    assert mix.answer.attention_error == pytest.approx(wanted.tolist(), rel=1e-3)
    # Nothing is watched any more, and nothing was that was not asked for.
    assert not any(layer.self_attn._forward_hooks for layer in tiny.model.model.layers)
    assert score(tiny, cells("mix"), plain)[0].answer == replace(mix.answer, attention_error=())


def test_full_is_read_once_for_all_cells(tiny: Any) -> None:
    shapes, handle = forwards(tiny)
    try:
        score(tiny, cells("origin", "full"), comparison(150, 20))
    finally:
        handle.remove()
    assert shapes == [(1, 149)] + [(1, 1)] * 40


# --- Peers ---

PEERS = ("hf:quanto-int4", "kvpress:snapkv", "kvpress:adakv")
"""One that quantizes, one that removes tokens, one that masks them."""


def decoded(tiny: Any, cell: Cell, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [T, V] behind each of ``tokens``, by the peer alone, token by token."""
    with torch.inference_mode():
        (recorded,) = record(tiny.model, [prompt], cell.recorded_queries)
        cache = cell.compress(tiny.model, recorded).cache
        with cell.decoding(tiny.model, [cache]):
            steps = [
                tiny.model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0].log_softmax(-1)
                for token in tokens
            ]
    return torch.stack(steps)


def likelihood(log_probabilities: torch.Tensor, tokens: tuple[int, ...]) -> float:
    return float(log_probabilities.gather(1, torch.tensor(tokens)[:, None]).sum())


def peer_cells(name: str) -> list[Cell]:
    return grid(["full", name], [{"cache_ratio": 0.25}], [8], None, {"budget_unit": "bytes"})


@pytest.mark.parametrize("name", PEERS)
def test_peers_score_continuations_as_they_decode(tiny: Any, name: str) -> None:
    context, continuations = ids(200), ((7,), (9, 10), (9, 10, 11), (9, 12, 13))
    full, mine = score(tiny, peer_cells(name), choices(*[(context, tokens) for tokens in continuations]), 8)
    wanted = [
        likelihood(decoded(tiny, mine.cell, context[:-1], (context[-1], *tokens[:-1])), tokens)
        for tokens in continuations
    ]
    assert sums(mine) == pytest.approx(wanted, abs=1e-3)
    assert all(abs(a - b) > 1e-3 for a, b in zip(sums(mine), sums(full), strict=True))
    assert mine.tokens_quantized + mine.tokens_evicted > 100


@pytest.mark.parametrize("name", PEERS)
def test_peers_read_texts_as_they_decode(tiny: Any, name: str) -> None:
    tokens = ids(200)
    request = Rolling(windows=(Continuation(context_ids=tokens[:1], token_ids=tokens[1:]),), prefill_share=0.5)
    full, mine = score(tiny, peer_cells(name), Document(id="d", request=request))
    prompt = int(0.5 * 199)
    behind = decoded(tiny, mine.cell, tokens[:prompt], tokens[prompt:199])
    wanted = plain_scores(tiny, tokens[:1], tokens[1 : prompt + 1])[0] + likelihood(behind, tokens[prompt + 1 :])
    assert sums(mine) == pytest.approx([wanted], abs=1e-2)
    assert abs(sums(mine)[0] - sums(full)[0]) > 0.05


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_compared_as_they_decode(tiny: Any, name: str) -> None:
    question = comparison()
    context, tokens = question.request.context_ids, question.request.continuation_ids
    full, mine = score(tiny, peer_cells(name), question)
    behind = decoded(tiny, mine.cell, context[:-1], (context[-1], *tokens[:-1]))
    with torch.no_grad():
        plain = tiny.model(torch.tensor([context + tokens])).logits[0, 149:-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(behind, plain, log_target=True, reduction="none").sum(-1)
    assert mine.answer.kl == pytest.approx(kl.tolist(), abs=1e-3)
    assert max(mine.answer.kl) > 1e-3
    assert set(full.answer.kl) == {0.0}


def test_peers_have_nothing_to_say_without_a_prompt(tiny: Any) -> None:
    grid_ = peer_cells("kvpress:snapkv")
    engine = Engine(tiny.model, tiny.tokenizer, grid_)
    full, failed = engine.answer(choices((ids(1), (7, 8)), (ids(200), (7,))), grid_)
    assert isinstance(full, Measurement)
    assert isinstance(failed, Failure)
    assert failed.error.startswith("kvpress:snapkv compresses a prompt, and here there is none")


# --- Failures ---


@pytest.mark.parametrize("kind", ["generate", "choices", "text", "compare"])
def test_a_cell_that_fails_leaves_the_others_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    question = {"generate": document(), "choices": MIXED, "text": text(), "compare": comparison()}[kind]
    grid_ = cells("full", "window", "mix")
    expected = [item.answer for item in answer(tiny, grid_, question) if item.cell.method != "window"]
    original = Engine.compress

    def failing(self: Engine, cell: Cell, *arguments: Any) -> Any:
        if cell.method == "window":
            raise torch.OutOfMemoryError("no memory\nis left")
        return original(self, cell, *arguments)

    monkeypatch.setattr(Engine, "compress", failing)
    *others, failed = Engine(tiny.model, tiny.tokenizer, grid_).answer(question, grid_)
    assert [item.answer for item in others if isinstance(item, Measurement)] == expected
    assert isinstance(failed, Failure)
    assert failed.cell == grid_[1]
    assert re.fullmatch(r"OutOfMemoryError: no memory is left \(test_engine\.py, line \d+\)", failed.error)


def test_what_cells_share_fails_for_all(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no prefill")

    monkeypatch.setattr(Engine, "prefill", failing)
    grid_ = cells("full", "mix")
    outcomes = list(Engine(tiny.model, tiny.tokenizer, grid_).answer(document(), grid_))
    assert [(type(item), item.cell) for item in outcomes] == [(Failure, cell) for cell in grid_]
    for item in outcomes:
        assert isinstance(item, Failure)
        assert re.fullmatch(r"RuntimeError: no prefill \(test_engine\.py, line \d+\)", item.error)


def test_a_prompt_read_in_chunks_is_answered_the_same(tiny: Any) -> None:
    grid_ = cells()
    whole = answer(tiny, grid_, document())
    engine = Engine(tiny.model, tiny.tokenizer, grid_, prefill_chunk=64)
    for one, other in zip(whole, measured_only(engine.answer(document(), grid_)), strict=True):
        assert one.answer == other.answer
        assert one.kv_bytes == other.kv_bytes
        assert one.tokens_evicted == other.tokens_evicted


# --- Documents side by side ---

BYTES: dict[str, Any] = {"budget_unit": "bytes", "tau1": 1.0, "tau2": 1.0, "tau3": 1.0}
"""Layers of a tiny model share bytes very unevenly under low taus."""


def few_cells() -> list[Cell]:
    """Every method, and a share of each prompt's bytes."""
    return [*cells(), *grid(["mix"], [{"cache_ratio": 0.3}], [8], ["int8"], BYTES)]


def all_cells() -> list[Cell]:
    """Every method in both units, with budgets that are the same for all prompts and with shares of each."""
    sizes = [{"cache_size": 64}, {"cache_ratio": 0.3}]
    return [*grid(METHODS, sizes, [8], ["int8"], {}), *grid(METHODS[1:], sizes, [8], ["int8"], BYTES)]


few_and_all = pytest.mark.parametrize(
    ("make_cells", "batch_size"), [(few_cells, 4), pytest.param(all_cells, None, marks=pytest.mark.slow)]
)


def several(tiny: Any) -> list[Document]:
    """Prompts longer and shorter than a budget; answers of several lengths, two of which end before their limit."""
    questions = [document(length, new, seed=length) for length, new in ((200, 12), (20, 20), (90, 1), (150, 16))]
    for length in (120, 30):
        question = document(length, 20, seed=length)
        middle = tiny.tokenizer.decode(generated(tiny, question)[5:7])
        questions.append(replace(question, request=replace(question.request, stop=(middle,))))
    return questions


def side_by_side(
    tiny: Any, grid_: list[Cell], questions: list[Document], batch_size: int | None
) -> dict[tuple[str, str], Measurement]:
    """By document and cell."""
    engine = Engine(tiny.model, tiny.tokenizer, grid_, batch_size=batch_size)
    found = {}
    for question, item in engine.answer_batch([(question, grid_) for question in questions]):
        assert isinstance(item, Measurement), item
        assert (question.id, item.cell.key) not in found
        found[question.id, item.cell.key] = item
    assert len(found) == len(questions) * len(grid_)
    return found


TIMES = ("prefill_s", "compress_s", "ttft_ms", "decode_s", "tpot_ms")


def assert_same_but_times(one: Measurement, other: Measurement) -> None:
    """Text, states and bytes to the last; log-likelihoods and ratios but for rounding."""
    left, right = (
        replace(item, **dict.fromkeys(TIMES, 0.0), oq_ratios=[], answer=Generated(text="")) for item in (one, other)
    )
    assert left == right
    assert one.oq_ratios == pytest.approx(other.oq_ratios, rel=1e-3)
    if isinstance(one.answer, Generated):
        assert one.answer == other.answer
    else:
        assert sums(one) == pytest.approx(sums(other), abs=1e-4)
        assert [item.is_greedy for item in one.answer.scored] == [item.is_greedy for item in other.answer.scored]


@few_and_all
def test_answers_do_not_depend_on_the_batch_size(
    tiny: Any, make_cells: Callable[[], list[Cell]], batch_size: int | None
) -> None:
    questions, grid_ = several(tiny), make_cells()
    alone = side_by_side(tiny, grid_, questions, 1)
    shapes, handle = forwards(tiny)
    try:
        together = side_by_side(tiny, grid_, questions, batch_size)
    finally:
        handle.remove()
    assert {rows for rows, length in shapes if length == 1} >= {2, 3}
    for key, measured in together.items():
        assert_same_but_times(measured, alone[key])
    assert len({item.generated_tokens for item in alone.values()}) > 4
    assert any(0 < item.tokens_quantized < item.tokens_original for item in alone.values())


@few_and_all
def test_scores_of_many_documents_do_not_depend_on_the_batch_size(
    tiny: Any, make_cells: Callable[[], list[Cell]], batch_size: int | None
) -> None:
    questions = [
        replace(MIXED, id="mixed"),
        replace(choices(*[(ids(90, seed=3), (token,)) for token in (5, 6, 7)]), id="letters"),
        replace(choices((ids(40, seed=4), (1, 2, 3)), (ids(41, seed=5), (1, 2, 3))), id="contexts"),
        replace(choices((ids(120, seed=6), ids(9, seed=7)), (ids(120, seed=6), ids(3, seed=8))), id="texts"),
    ]
    grid_ = make_cells()
    alone, together = (side_by_side(tiny, grid_, questions, size) for size in (1, batch_size))
    for key, measured in together.items():
        assert_same_but_times(measured, alone[key])


def test_requests_of_every_kind_can_stand_in_one_batch(tiny: Any) -> None:
    questions = [document(), document(seed=1), MIXED, text(), comparison(), document(seed=2)]
    grid_ = cells("full", "mix")
    alone, together = (side_by_side(tiny, grid_, questions, size) for size in (1, 8))
    for key, measured in together.items():
        if not isinstance(measured.answer, Compared):
            assert_same_but_times(measured, alone[key])


def test_short_prompts_are_computed_in_one_forward(tiny: Any) -> None:
    questions = [document(length, 1, seed=length) for length in (60, 30, 300, 200, 40)]
    shapes, handle = forwards(tiny)
    try:
        side_by_side(tiny, cells("full", "mix"), questions, 8)
    finally:
        handle.remove()
    assert shapes == [(3, 60), (1, 200), (1, 300)]


def test_every_document_is_answered_by_its_own_cells(tiny: Any) -> None:
    full, window, mix = cells("full", "window", "mix")
    work = [(document(seed=0), [mix]), (document(seed=1), [full, window, mix]), (document(seed=2), [window])]
    engine = Engine(tiny.model, tiny.tokenizer, [full, window, mix], batch_size=8)
    found = [(question.id, item.cell.method) for question, item in engine.answer_batch(work)]
    assert sorted(found) == [("d0", "mix"), ("d1", "full"), ("d1", "mix"), ("d1", "window"), ("d2", "window")]


def test_all_that_takes_long_is_said_while_it_is_done(tiny: Any) -> None:
    engine, said = Engine(tiny.model, tiny.tokenizer, cells("mix"), batch_size=8), []
    engine.watch = said.append
    list(engine.answer_batch([(document(seed=0), engine.cells)]))
    reading, compressing, *tokens = said
    length = len(document(seed=0).request.prompt_ids)
    assert reading == f"reading 1 prompt of up to {length} tokens"
    assert compressing == f"{engine.cells[0].label}: compressing {length} tokens"
    assert tokens
    assert all(" of 1 answer" in item for item in tokens)


@pytest.mark.parametrize("method", ["kvpress:snapkv", "hf:quanto-int4"])
def test_peers_answer_in_a_batch_as_alone(tiny: Any, method: str) -> None:
    questions, grid_ = several(tiny), peer_cells(method)
    alone, together = (side_by_side(tiny, grid_, questions, size) for size in (1, 8))
    for key, measured in together.items():
        assert_same_but_times(measured, alone[key])


def test_a_document_that_fails_leaves_its_batch_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    questions, grid_ = several(tiny), cells("full", "window")
    alone = side_by_side(tiny, grid_, questions, 1)
    original = Engine.compress

    def failing(self: Engine, cell: Cell, prefill: Any, beside: Any) -> Any:
        if cell.method == "window" and prefill.tokens == 90:
            raise torch.OutOfMemoryError("no memory is left")
        return original(self, cell, prefill, beside)

    monkeypatch.setattr(Engine, "compress", failing)
    engine = Engine(tiny.model, tiny.tokenizer, grid_, batch_size=8)
    outcomes = list(engine.answer_batch([(question, grid_) for question in questions]))
    failed = [(question.id, item.cell) for question, item in outcomes if isinstance(item, Failure)]
    assert failed == [("d90", grid_[1])]
    measured = {(q.id, item.cell.key): item for q, item in outcomes if isinstance(item, Measurement)}
    assert len(measured) == len(alone) - 1
    for key, item in measured.items():
        assert_same_but_times(item, alone[key])


@pytest.mark.parametrize("fatal", [False, True])
def test_what_a_batch_shares_is_tried_again_one_by_one(tiny: Any, monkeypatch: pytest.MonkeyPatch, fatal: bool) -> None:
    """Memory that is short for two may do for one; a document that fails alone fails alone."""
    grid_ = cells("full", "mix")
    engine = Engine(tiny.model, tiny.tokenizer, grid_, batch_size=2)
    bad = document(seed=1)
    original, original_decode = generation.step, generation.decode

    def failing(steps: Steps, side_by_side: Any) -> Any:
        if len(side_by_side.rows) == 2 and side_by_side.whole is not None:
            raise torch.OutOfMemoryError("no memory is left")
        return original(steps, side_by_side)

    def failing_decode(steps: Steps, cell: Cell, rows: Any) -> None:
        if fatal and cell.method == "mix" and rows[-1].job.document.id == bad.id:
            raise ValueError("never")
        original_decode(steps, cell, rows)

    monkeypatch.setattr(generation, "step", failing)
    monkeypatch.setattr(generation, "decode", failing_decode)
    outcomes = list(engine.answer_batch([(document(seed=seed), grid_) for seed in range(3)]))
    last = Failure if fatal else Measurement
    assert [(question.id, item.cell.method, type(item)) for question, item in outcomes] == [
        *[("d0", "full", Measurement), ("d1", "full", Measurement), ("d0", "mix", Measurement), ("d1", "mix", last)],
        *[("d2", "full", Measurement), ("d2", "mix", Measurement)],
    ]


def test_shares_of_a_batch_add_up_to_its_time(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stopwatch shows one second; each of the three documents takes part in 11 steps."""
    monkeypatch.setattr("bench.telemetry.Stopwatch.__exit__", lambda self, *_: setattr(self, "seconds", 1.0))
    found = side_by_side(tiny, cells("mix"), [document(seed=seed) for seed in range(3)], 3)
    assert {item.generated_tokens for item in found.values()} == {12}
    assert sum(item.decode_s for item in found.values()) == pytest.approx(11)
    for item in found.values():
        assert item.tpot_ms == pytest.approx(1000 / 3)
        # Computed two at a time, and one.
        assert item.prefill_s in (0.5, 1.0)


def test_an_automatic_batch_takes_what_fits(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 layers, keys and values, 2 heads of 16 in float32: a prefill, a cache as large, and the answer.
    each = 512 * (2 * 200 + 12)
    engine = Engine(tiny.model, tiny.tokenizer, cells("mix"), batch_size=None)
    jobs = [Job(document(seed=seed), engine.cells) for seed in range(40)]
    assert [len(batch) for batch in engine._side_by_side(jobs)] == [32, 8]
    monkeypatch.setattr("bench.engine.engine.AUTO_BYTES", 15 * each + 1)
    assert [len(batch) for batch in engine._side_by_side(jobs)] == [15, 15, 10]
    monkeypatch.setattr("bench.engine.engine.AUTO_BYTES", 1)
    assert {len(batch) for batch in engine._side_by_side(jobs)} == {1}
