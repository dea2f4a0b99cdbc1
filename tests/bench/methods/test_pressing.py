"""Presses that share a prefill: each makes what it makes alone, whoever stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from arkv import storage_bytes
from bench.engine.engine import Engine, Failure, Measurement
from bench.extend import Method, keep_tokens
from bench.methods.base import drawing_the_same
from bench.methods.cell import Cell
from bench.methods.grid import OwnMethod, grid, other_cell
from bench.methods.kvpress import Press, in_one_prefill
from bench.methods.names import PRESSES, usable_presses
from bench.methods.pressed import PressedLayer
from bench.methods.presses import library
from bench.methods.prompt import Asked, Compressed
from bench.methods.reading import record
from tasks.base import Compare, Continuation, Document, Generate, LogLikelihood, Rolling
from tests.bench.engine.test_engine import forwards

if find_spec("kvpress") is None:
    pytest.skip("kvpress is not installed", allow_module_level=True)

LENGTH, QUESTION = 203, 9
NAMES = [
    *(name for name in usable_presses() if PRESSES[name].decodes is None),
    *("adakv[alpha_safeguard=0.05]+expected_attention", "chunkkv[chunk_length=8]+tova", "pyramidkv[window_size=16]"),
    *("kvzip[kvzip_plus_normalization=true]", "kvzip[layerwise=true;chunk_size=64]", "cur[use_random_leverage=true]"),
]
BUDGETS = [Asked("tokens", cache_size=61), Asked("tokens", cache_ratio=0.15), Asked("tokens", cache_size=500)]
"""The last one holds everything."""
ALONE = {"kvcompose", "kvgrad"}
"""Eager attention, and gradients: what they do to the prefill is their own."""


@pytest.fixture(autouse=True)
def _no_trace(tiny: Any) -> Iterator[None]:
    """Afterwards the model and the random numbers are as they were."""

    def trace() -> list[Any]:
        modules = list(tiny.model.modules())
        return [
            torch.get_rng_state().tolist(),
            [{*vars(module), *module._modules} for module in modules],
            [list(module._forward_hooks) for module in modules],
        ]

    library("kvpress:snapkv")
    before = trace()
    yield
    assert trace() == before


def ids(seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 300, (1, length), generator=torch.Generator().manual_seed(seed))


def press(name: str) -> Press:
    impl = other_cell(f"kvpress:{name}", unit="tokens", cache_size=64).impl
    assert isinstance(impl, Press)
    return impl


def same(one: Any, other: Any) -> bool:
    """Tensors, or tuples of them, or None."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one is other


def asked_of(*names: str, budget: float = 0.25) -> list[Cell]:
    return grid([f"kvpress:{name}" for name in names], [{"cache_ratio": budget}, {"cache_ratio": 0.5}], [], None, {})


def test_all_but_two_presses_share_a_prefill() -> None:
    assert {name for name in NAMES if press(name).prefill_group is None} == ALONE
    assert press("decoding[compression_interval=4]+knorm").prefill_group is None


@pytest.fixture(scope="module")
def by_themselves(tiny: Any) -> dict[tuple[str, int], Compressed]:
    """What each press makes in its own context, around a prefill that nobody shares."""
    made = {}
    with torch.inference_mode():
        for name in NAMES:
            for place, asked in enumerate(BUDGETS):
                if name not in ALONE:
                    made[name, place] = press(name)._by_itself(tiny.model, ids(), asked, QUESTION)
    return made


@pytest.mark.parametrize("turned", [False, True], ids=["in order", "the other way round"])
def test_what_a_press_makes_is_what_it_makes_alone(tiny: Any, by_themselves: Any, turned: bool) -> None:
    """All presses and budgets in one prefill: to the last bit, whoever comes before."""
    keys = list(reversed(by_themselves)) if turned else list(by_themselves)
    with torch.inference_mode():
        found = in_one_prefill(tiny.model, ids(), [(press(name), BUDGETS[place]) for name, place in keys], QUESTION)
    seconds = {made.prefill_s for made in found if isinstance(made, Compressed)}
    assert len(seconds) == 1
    for key, made in zip(keys, found, strict=True):
        alone = by_themselves[key]
        assert isinstance(made, Compressed), (key, made)
        assert torch.equal(made.logits, alone.logits), key
        assert made.kv_bytes == storage_bytes(made.cache) == alone.kv_bytes, key
        assert made.compress_s is not None
        for layer, expected in zip(made.cache.layers, alone.cache.layers, strict=True):
            assert isinstance(layer, PressedLayer)
            assert torch.equal(layer.keys, expected.keys), key
            assert torch.equal(layer.values, expected.values), key
            assert same(layer.masked, expected.masked), key
            assert (layer.tokens_seen, layer.removed) == (expected.tokens_seen, expected.removed), key


def test_one_forward_for_all_and_one_second_reading_for_all_budgets(tiny: Any) -> None:
    presses = ["snapkv", "adakv", "kvzip", "kvzip[kvzip_plus_normalization=true]"]
    wanted = [(press(name), asked) for name in presses for asked in BUDGETS]
    shapes, handle = forwards(tiny)
    try:
        with torch.inference_mode():
            in_one_prefill(tiny.model, ids(), wanted)
    finally:
        handle.remove()
    assert shapes[0] == (1, LENGTH)
    # Two KVzips, each of which is to say the text again behind a few words.
    assert len(shapes) == 3
    assert all(tokens >= LENGTH for _, tokens in shapes[1:])


def test_keys_and_values_that_nobody_removes_are_there_once(tiny: Any) -> None:
    with torch.inference_mode():
        found = in_one_prefill(tiny.model, ids(), [(press("adakv"), asked) for asked in BUDGETS])
        found += in_one_prefill(tiny.model, ids(), [(press("kvzip"), asked) for asked in BUDGETS])
    for three in (found[:3], found[3:]):
        caches = [made.cache for made in three if isinstance(made, Compressed)]
        assert len({layer.keys.data_ptr() for cache in caches for layer in cache.layers}) == len(caches[0].layers)


def test_draws_hang_on_the_press_alone(tiny: Any) -> None:
    wanted = [(press("random"), BUDGETS[0]), (press("leverage"), BUDGETS[0])]
    with torch.inference_mode(), drawing_the_same(tiny.model):
        torch.manual_seed(7)
        first, second = (in_one_prefill(tiny.model, ids(), pairs) for pairs in (wanted, wanted[::-1]))
    for one, other in zip(first, second[::-1], strict=True):
        assert isinstance(one, Compressed)
        assert isinstance(other, Compressed)
        assert torch.equal(one.cache.layers[1].keys, other.cache.layers[1].keys)


REQUESTS = {
    "generate": Generate(prompt_ids=tuple(ids()[0].tolist()), max_new_tokens=3),
    "question": Generate(prompt_ids=tuple(ids()[0].tolist()), question_ids=(5, 6), max_new_tokens=3),
    "choices": LogLikelihood(
        continuations=tuple(Continuation(context_ids=tuple(ids()[0].tolist()), token_ids=(t, 9)) for t in (5, 6))
    ),
    "text": Rolling(
        windows=(Continuation(context_ids=(1,), token_ids=tuple(ids()[0].tolist())),), prefill_share=0.9, chunk=8
    ),
    "compare": Compare(context_ids=tuple(ids()[0].tolist()), continuation_ids=(5, 6, 7)),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_the_engine_reads_a_context_once_for_all_presses(tiny: Any, kind: str) -> None:
    """Whatever is asked: once for the cache that methods share, once for the presses; and answers are those of one."""
    cells = [*grid(["full", "mix"], [{"cache_ratio": 0.25}], [8], None, {}), *asked_of("snapkv", "knorm", "adakv")]
    document = Document(id="d", request=REQUESTS[kind])
    engine = Engine(tiny.model, tiny.tokenizer, cells)
    alone = [engine.answer(document, [cell]) for cell in cells]
    expected = {item.cell: item for outcomes in alone for item in outcomes}
    shapes, handle = forwards(tiny)
    try:
        found = list(engine.answer(document, cells))
    finally:
        handle.remove()
    assert len([tokens for _, tokens in shapes if tokens > 100]) == 2
    assert [item.cell for item in found] == cells
    for item in found:
        other = expected[item.cell]
        assert isinstance(item, Measurement)
        assert isinstance(other, Measurement)
        assert item.answer == other.answer
        assert (item.tokens_original, item.kv_bytes) == (other.tokens_original, other.kv_bytes)
    # A prefill is every press's, whole.
    assert len({item.prefill_s for item in found[2:] if isinstance(item, Measurement)}) == 1


def test_documents_of_a_batch_have_a_prefill_each(tiny: Any) -> None:
    """Presses take turns at a document, so that no more than one document's caches are held."""
    cells = [*asked_of("snapkv", "adakv"), *grid(["full"], [{"cache_ratio": 0.25}], [], None, {})]
    requests = [Generate(prompt_ids=tuple(ids(seed)[0].tolist()), max_new_tokens=2) for seed in range(3)]
    work = [(Document(id=f"d{place}", request=request), cells) for place, request in enumerate(requests)]
    engine = Engine(tiny.model, tiny.tokenizer, cells, batch_size=None)
    shapes, handle = forwards(tiny)
    try:
        found = [(document.id, item.cell) for document, item in engine.answer_batch(work)]
    finally:
        handle.remove()
    assert len([tokens for rows, tokens in shapes if tokens == LENGTH for _ in range(rows)]) == 6
    assert found[:12] == [(document.id, cell) for document, _ in work for cell in cells[:4]]
    assert len(found) == 15


def test_questions_to_one_context_share_what_the_presses_made(tiny: Any) -> None:
    cells = asked_of("snapkv", "kvzip")
    context = tuple(ids()[0].tolist())
    documents = [
        Document(id=str(n), request=Generate(prompt_ids=context, question_ids=(5 + n, 6), max_new_tokens=2))
        for n in range(3)
    ]
    engine = Engine(tiny.model, tiny.tokenizer, cells)
    shapes, handle = forwards(tiny)
    try:
        found = [item for _, item in engine.answer_batch([(document, cells) for document in documents])]
    finally:
        handle.remove()
    # Prefill, the presses' own, KVzip's second reading.
    assert len([tokens for _, tokens in shapes if tokens >= LENGTH]) == 3
    assert len(found) == 12
    assert all(isinstance(item, Measurement) for item in found)


@pytest.mark.parametrize("name", ["knorm", "kvzip"])
def test_a_press_that_fails_fails_its_own_rows(tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import kvpress

    cells = asked_of("snapkv", "adakv", name)
    document = Document(id="d", request=REQUESTS["generate"])
    engine = Engine(tiny.model, tiny.tokenizer, cells)
    fine = [item for item in engine.answer(document, cells) if isinstance(item, Measurement)]
    assert len(fine) == 6

    def failing(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory is left")

    kind, method = (kvpress.KnormPress, "score") if name == "knorm" else (kvpress.KVzipPress, "score_kvzip")
    monkeypatch.setattr(kind, method, failing)
    shapes, handle = forwards(tiny)
    try:
        outcomes = list(engine.answer(document, cells))
    finally:
        handle.remove()
    assert len([tokens for _, tokens in shapes if tokens == LENGTH]) == 2
    assert [item.answer for item in outcomes[:4] if isinstance(item, Measurement)] == [item.answer for item in fine[:4]]
    for item in outcomes[4:]:
        assert isinstance(item, Failure)
        assert item.error.startswith(f"kvpress:{name}: OutOfMemoryError: no memory is left")


def test_what_the_model_cannot_do_fails_all_of_them_at_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not tried again for each."""
    cells = asked_of("snapkv", "adakv")
    (prompt,) = record(tiny.model, ids().tolist(), 1)
    calls = []

    def failing(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise ValueError("not with this model")

    monkeypatch.setattr(type(tiny.model), "forward", failing)
    for cell in cells:
        with pytest.raises(Exception, match=f"{cell.method}: kvpress cannot do .* not with this model"):
            cell.compress(tiny.model, prompt, cells)
    assert len(calls) == 1
    assert not prompt.waiting


class Halves(Method):
    """A plugin's, which reads prompts anew, once for all its budgets."""

    name = "halves"
    prefill_group = "halves"
    made = 0

    def compress(self, model: Any, prompt: Any, budget: Any) -> Any:
        kept = torch.arange(prompt.tokens - budget.tokens, prompt.tokens)
        return keep_tokens(prompt, [kept for _ in prompt.layers])

    def make_all(self, model: Any, prompt: Any, wanted: Any) -> Any:
        type(self).made += 1
        return [method.make(model, prompt, asked) for method, asked in wanted]


class Wordless(Halves):
    name = "wordless"
    prefill_group = "wordless"
    make_all = Method.make_all


def test_a_method_of_a_plugin_can_share_a_prefill(tiny: Any) -> None:
    budgets = [{"cache_ratio": 0.25}, {"cache_ratio": 0.5}]
    own = {"halves": OwnMethod(Halves(), "1"), "wordless": OwnMethod(Wordless(), "1")}
    cells = grid(["halves", "full", "wordless"], budgets, [], None, {}, own)
    document = Document(id="d", request=REQUESTS["generate"])
    first, second, full, *failed = Engine(tiny.model, tiny.tokenizer, cells).answer(document, cells)
    assert Halves.made == 1
    assert isinstance(first, Measurement)
    assert isinstance(second, Measurement)
    assert isinstance(full, Measurement)
    assert (first.tokens_evicted, second.tokens_evicted) == (LENGTH - 50, LENGTH - 101)
    for item in failed:
        assert isinstance(item, Failure)
        assert "wordless says that it shares a prefill, and has no make_all" in item.error
