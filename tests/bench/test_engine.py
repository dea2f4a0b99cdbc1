"""One prefill per document, answers as the model alone would give them, and true bytes."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

from arkv import TriStateCache
from bench.engine import Engine, Measurement
from bench.methods import Cell, grid
from tasks.base import Document, Generate

METHODS = ["full", "window", "origin", "quant", "mix"]


def cells(*methods: str, cache_size: int = 64) -> list[Cell]:
    return grid(methods or METHODS, [{"cache_size": cache_size}], [8], ["int8"], {})


def document(length: int = 200, new: int = 12, seed: int = 0, stop: tuple[str, ...] = ()) -> Document:
    ids = torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Document(id=f"d{seed}", request=Generate(prompt_ids=tuple(ids), max_new_tokens=new, stop=stop))


def answer(tiny: Any, grid_: list[Cell], question: Document) -> list[Measurement]:
    return list(Engine(tiny.model, tiny.tokenizer, grid_).answer(question, grid_))


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
        assert item.kv_bytes == reachable_bytes(cache.layers) > 0
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


def test_times_are_those_of_the_parts(tiny: Any) -> None:
    for measured in answer(tiny, cells("full", "mix"), document()):
        assert measured.ttft_ms >= 1000 * (measured.prefill_s + measured.compress_s)
        assert measured.tpot_ms == pytest.approx(1000 * measured.decode_s / (measured.generated_tokens - 1))
        assert measured.decode_tokens_per_s == pytest.approx(1000 / measured.tpot_ms)
        assert measured.peak_memory_bytes is None, "unknown on a CPU"
    (single,) = answer(tiny, cells("full"), document(new=1))
    assert (single.generated_tokens, single.tpot_ms, single.decode_tokens_per_s) == (1, None, None)
