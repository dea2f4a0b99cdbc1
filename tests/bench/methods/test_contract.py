"""What every method that is offered keeps to, one by one: those of the suite, of libraries, and of a plugin."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import cache_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkv import storage_bytes
from bench.costs.plan import model_size
from bench.costs.speed import SpeedBench
from bench.engine.engine import Engine, Failure, Measurement
from bench.extend import EVICTED, ORIGINAL, QUANTIZED, Method, keep_tokens
from bench.methods.cell import Cell, Held
from bench.methods.grid import OwnMethod, grid
from bench.methods.hf import FP8_LAYER
from bench.methods.kvpress import Press
from bench.methods.names import BACKENDS, PRESSES, usable_presses
from bench.methods.prompt import Prompt
from bench.methods.reading import forward, record
from bench.methods.variants import Variant
from bench.names import CEILING, DESCRIPTIONS, FULL, FUSED, HF, KVPRESS
from bench.records.timing import Timing
from tasks.base import Document, Generate

LENGTH, STEPS, QUESTION = 203, 3, 9
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Of the tiny model: layers, key and value, KV heads, head dim, bytes of a float."""


class Newest(Method):
    """As a plugin has it: nothing but what it must say."""

    name = "newest"

    def compress(self, model: Any, prompt: Prompt, budget: Any) -> Any:
        kept = torch.arange(prompt.tokens - budget.tokens, prompt.tokens)
        return keep_tokens(prompt, [kept for _ in prompt.layers])


OWN = {"newest": OwnMethod(Newest(), "1")}
LIBRARIES = [f"{HF}:{name}" for name in BACKENDS if name != "fp8" or hasattr(cache_utils, FP8_LAYER)]
LIBRARIES += [
    f"{KVPRESS}:{name}" if PRESSES[name].decodes is None else f"{KVPRESS}:{name}[compression_interval=2]+knorm"
    for name in usable_presses()
]
LIBRARIES += [
    f"{KVPRESS}:{name}"
    for name in (
        "kvzip[kvzip_plus_normalization=true]",
        "adakv[alpha_safeguard=0.1]+expected_attention",
        "criticaladakv+expected_attention",
        "kvzip+quanto-int4",
        "snapkv+quanto-int4",
        "snapkv+hqq-int2",
        "key_rerotation+knorm+quanto-int2",
    )
]
NEEDS = {name: name.partition(":")[0] for name in LIBRARIES}
NEEDS |= {name: "hqq" if "hqq" in name else "optimum.quanto" for name in LIBRARIES if name.startswith(HF)}
REREAD = Variant(name="reread", base="mix", budget_unit="bytes", importance="replay", head_budgets="all", n_recent=4)
"""KV heads hold different numbers of tokens, by scores of a second reading."""
OFFERED = [*DESCRIPTIONS, *OWN, REREAD.name, *LIBRARIES]


def asked_for(name: str) -> str | Variant:
    """The method of this name as the grid takes it."""
    return REREAD if name == REREAD.name else name


@pytest.fixture(params=OFFERED)
def cell(request: pytest.FixtureRequest) -> Cell:
    """The method at a quarter of each prompt's bytes."""
    name = request.param
    if name in NEEDS and find_spec(NEEDS[name].partition(".")[0]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    (cell,) = grid([asked_for(name)], [{"cache_ratio": 0.25}], [8], None, {"budget_unit": "bytes"}, OWN)
    return cell


@pytest.fixture(autouse=True)
def _no_trace(tiny: Any, cell: Cell) -> Iterator[None]:
    """Afterwards the model, transformers and the random numbers are as they were."""

    def trace() -> list[Any]:
        model = tiny.model
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return [
            dict(ALL_ATTENTION_FUNCTIONS.items()),
            torch.get_rng_state().tolist(),
            model.config.to_dict(),
            [parameter.requires_grad for parameter in model.parameters()],
            [parameter.grad for parameter in model.parameters()],
            [{*vars(module), *module._modules} for module in model.modules()],
            [[list(getattr(module, name)) for name in hooks] for module in model.modules()],
            [parameter.sum().item() for parameter in model.parameters()],
        ]

    # What comes with the import of a library is no method's.
    before = trace()
    yield
    assert trace() == before


def prompt_ids(seed: int = 0, length: int = LENGTH) -> list[int]:
    return torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def recorded(tiny: Any, cell: Cell) -> Prompt:
    (prompt,) = record(tiny.model, [prompt_ids()], cell.recorded_queries)
    return replace(prompt, question=QUESTION)


@torch.inference_mode()
def decode(tiny: Any, cell: Cell, cache: Any, steps: int = STEPS) -> torch.Tensor:
    """Logits [T, V] behind given tokens."""
    with cell.decoding(tiny.model, [cache]):
        return torch.cat([forward(tiny.model, [cache], [[5 + step]])[0] for step in range(steps)])


def masks(cell: Cell) -> bool:
    """It leaves tokens stored that single heads do not attend to."""
    return isinstance(cell.impl, Press) and cell.impl.plan.masks


def counts(held: Held) -> tuple[float, float, float]:
    return held.original, held.quantized, held.evicted


@torch.inference_mode()
def test_the_budget_the_states_and_what_follows(tiny: Any, cell: Cell) -> None:
    prompt = recorded(tiny, cell)
    made = cell.compress(tiny.model, prompt)
    held = cell.held(made.cache, prompt)
    assert made.logits is not None
    assert made.logits.shape == (1, tiny.model.config.vocab_size)
    assert made.kv_bytes == held.kv_bytes == storage_bytes(made.cache)
    assert held.full_kv_bytes == LENGTH * TOKEN_BYTES
    assert sum(counts(held)) == pytest.approx(LENGTH)
    assert min(counts(held)) >= 0
    # Something is really compressed, and what quantizes says so.
    waits = cell.method.startswith(f"{KVPRESS}:decoding")
    assert (held.quantized + held.evicted > 0) is not (cell.method == FULL or waits)
    assert (held.quantized > 0) is cell.quantizes
    # Bytes within the budget, or the excess is said in words.
    most = held.full_kv_bytes if not cell.impl.has_budget else cell.asked.of(prompt).nbytes
    over = held.kv_bytes > 1.02 * most
    # At float32 all tokens fit into the budget once they are quantized.
    assert over is ((masks(cell) and not cell.quantizes) or cell.method.startswith(f"{KVPRESS}:decoding"))
    assert (held.ragged_kv_bytes is not None) is masks(cell)
    assert held.ragged_kv_bytes is None or held.ragged_kv_bytes <= 1.02 * most
    if masks(cell) and not cell.quantizes:
        # What single heads leave out is no less, and no more, than what was asked for.
        assert held.original == pytest.approx(cell.asked.kept(LENGTH), abs=1)
    assert cell.impl.limits or not (over or (cell.method.startswith(HF) and not cell.impl.has_budget))
    # Decoding goes on from it, every token counted once.
    decode(tiny, cell, made.cache)
    after = cell.held(made.cache, prompt)
    assert sum(counts(after)) == pytest.approx(LENGTH + STEPS)
    assert (after.quantized + after.evicted > 0) is (cell.method != FULL)
    assert after.full_kv_bytes == (LENGTH + STEPS) * TOKEN_BYTES


@torch.inference_mode()
def test_a_fork_goes_its_own_way(tiny: Any, cell: Cell) -> None:
    prompt = recorded(tiny, cell)
    cache = cell.compress(tiny.model, prompt).cache
    before = cell.held(cache, prompt)
    with cell.decoding(tiny.model, [cache]):
        first, second = cell.fork(cache), cell.fork(cache)
    ahead = decode(tiny, cell, first)
    assert cell.held(cache, prompt) == before
    assert torch.equal(decode(tiny, cell, second), ahead)
    assert torch.equal(decode(tiny, cell, cache), ahead)
    assert torch.isfinite(ahead).all()


@torch.inference_mode()
def test_the_states_map_is_what_is_counted(tiny: Any, cell: Cell) -> None:
    prompt = recorded(tiny, cell)
    cache = cell.compress(tiny.model, prompt).cache
    for _ in range(2):
        codes, held = cell.states(cache), cell.held(cache, prompt)
        if codes is None:
            # A press leaves no sign of the tokens that it has removed.
            assert cell.method.startswith(KVPRESS)
            assert held.kv_bytes < held.full_kv_bytes
            assert not cell.impl.knows_states
            return
        assert list(codes) == [0, 1]
        for code, count in ((ORIGINAL, held.original), (QUANTIZED, held.quantized), (EVICTED, held.evicted)):
            shares = [float((item == code).float().sum(dim=-1).mean()) for item in codes.values()]
            assert sum(shares) / 2 == pytest.approx(count)
        decode(tiny, cell, cache)


def test_documents_side_by_side_are_answered_as_alone(tiny: Any, cell: Cell) -> None:
    requests = [
        Generate(prompt_ids=tuple(prompt_ids(seed, length)), question_tokens=QUESTION, max_new_tokens=4)
        for seed, length in ((1, LENGTH), (2, 150))
    ]
    questions = [Document(id=str(place), request=request) for place, request in enumerate(requests)]
    found: list[Mapping[str, Measurement]] = []
    for batch_size in (1, 2):
        engine = Engine(tiny.model, tiny.tokenizer, [cell], batch_size=batch_size)
        outcomes = list(engine.answer_batch([(question, [cell]) for question in questions]))
        assert all(isinstance(item, Measurement) for _, item in outcomes), outcomes
        found.append({question.id: item for question, item in outcomes if isinstance(item, Measurement)})
    times = dict.fromkeys(("prefill_s", "compress_s", "ttft_ms", "decode_s", "tpot_ms"), 0.0)
    for name, alone in found[0].items():
        one, other = (asdict(replace(item, cell=None, **times)) for item in (alone, found[1][name]))  # type: ignore[arg-type]
        one["oq_ratios"] = pytest.approx(one["oq_ratios"], rel=1e-3)
        assert one == other


def test_a_question_behind_a_context_that_the_budget_holds_is_answered_as_by_the_model(tiny: Any, cell: Cell) -> None:
    """The stock cache is fed context and question as one prompt."""
    context, question = tuple(prompt_ids(3)), tuple(prompt_ids(4, 9))
    whole = torch.tensor([context + question])
    expected = tiny.model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False)
    # Room for question and answer as well: a share of the context would be less than all that is read.
    (roomy,) = grid([asked_for(cell.method)], [{"cache_size": 512}], [8], None, {}, OWN)
    request = Generate(prompt_ids=context, question_ids=question, max_new_tokens=6)
    questions = [Document(id=name, request=request) for name in "ab"]
    engine = Engine(tiny.model, tiny.tokenizer, [roomy])
    outcomes = [item for _, item in engine.answer_batch([(item, [roomy]) for item in questions])]
    if cell.impl.needs_question:
        said = f"{cell.method} has to be told where .* give --question before"
        assert all(isinstance(item, Failure) and re.match(said, item.error) for item in outcomes), outcomes
        return
    assert all(isinstance(item, Measurement) for item in outcomes), outcomes
    first, second = (item for item in outcomes if isinstance(item, Measurement))
    # Both read copies of one cache: what the first one read is nothing to the second.
    assert first.answer == second.answer
    if not roomy.quantizes or roomy.cache_config is not None:
        assert list(first.answer.token_ids) == expected[0, whole.shape[1] :].tolist()  # type: ignore[union-attr]


@torch.inference_mode()
def test_a_batch_of_copies_decodes_as_the_one(tiny: Any, cell: Cell) -> None:
    cache = cell.compress(tiny.model, recorded(tiny, cell)).cache
    whole, before = cell.repeated(cache, 3), storage_bytes(cache)
    if whole is None:
        assert cell.method.startswith((f"{HF}:fp8", KVPRESS))
        return
    assert storage_bytes(whole) == pytest.approx(3 * before, rel=0.02)
    with cell.decoding(tiny.model, [whole]):
        logits = [tiny.model(torch.tensor([[5 + step]] * 3), past_key_values=whole).logits for step in range(STEPS)]
    together = torch.cat(logits, dim=1)
    torch.testing.assert_close(together, decode(tiny, cell, cache)[None].expand(3, -1, -1), rtol=1e-3, atol=1e-3)


def test_it_is_timed_and_planned(tiny: Any, cell: Cell) -> None:
    bench = SpeedBench(tiny.model, [cell], prompt_ids(), new_tokens=2)
    timings = [item for item in bench.measure(LENGTH, 0) if isinstance(item, Timing)]
    ceiling = [CEILING] if cell.impl.has_budget else []
    assert [timing.method for timing in timings] == [
        *(FULL, FUSED, *ceiling),
        *([] if cell.method == FULL else [cell.method]),
    ]
    # All tokens at model precision, with a score and a position each and a table of rows.
    assert timings[0].kv_bytes < timings[1].kv_bytes < 1.1 * timings[0].kv_bytes
    mine = timings[-1]
    assert mine.kv_bytes <= timings[0].kv_bytes * 1.3
    planned = cell.planned_bytes(model_size(tiny, "float32"), LENGTH)
    if cell.method.startswith(f"{KVPRESS}:decoding"):
        # The whole prompt, until it is compressed.
        assert planned == LENGTH * TOKEN_BYTES > mine.kv_bytes
    elif planned is None:
        assert cell.quantizes
    else:
        assert 0.4 * planned <= mine.kv_bytes <= 1.1 * planned + 3 * TOKEN_BYTES


def test_a_cell_reaches_another_process(cell: Cell) -> None:
    again = pickle.loads(pickle.dumps(cell))
    assert again == cell
    assert (again.label, again.quant_format, again.recorded_queries) == (
        *(cell.label, cell.quant_format, cell.recorded_queries),
    )
