"""Methods of others: the same tokens as by themselves, true bytes, no trace."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, cache_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkv import storage_bytes
from bench.engine.engine import Engine
from bench.errors import UserError
from bench.methods import hf, names, presses, versions
from bench.methods.cell import Cell
from bench.methods.grid import grid, other_cell
from bench.methods.hf import FP8_LAYER
from bench.methods.prompt import Asked, Compressed
from bench.methods.reading import record
from tasks.base import Document, Generate
from tests.bench.conftest import quiet_environment
from tests.conftest import ROOT

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
LENGTH = 203
GROUPED = [name for name in names.BACKENDS if name != "fp8"]
HAS_FP8 = hasattr(cache_utils, FP8_LAYER)
EVICTING = ("snapkv", "pyramidkv", "streaming_llm", "expected_attention", "tova", "knorm")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config, kind = FAMILIES[request.param]
    made = kind(config(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(0, 97, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_importing_kvpress_patches_nothing() -> None:
    """In a process of its own: the import wraps every attention function, once."""
    code = (
        "import arkv\n"  # which registers a function of its own
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "before = dict(functions.items())\n"
        "from bench.methods.presses import library\n"
        "assert library('kvpress:snapkv').SnapKVPress\n"
        "assert dict(functions.items()) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=quiet_environment(), cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture(autouse=True, scope="module")
def _kvpress_is_imported() -> None:
    """By the suite and not by a test, whose import would patch transformers."""
    if find_spec("kvpress") is not None:
        presses.library("kvpress:snapkv")


@pytest.fixture(autouse=True)
def _no_trace(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test transformers and the model are as they were."""
    model = request.getfixturevalue("model") if "model" in request.fixturenames else None
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    names = [{*vars(module), *module._modules} for module in model.modules()] if model is not None else []
    yield
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == functions
    if model is not None:
        assert [{*vars(module), *module._modules} for module in model.modules()] == names
        assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def alone(model: Any, prompt: torch.Tensor, press: Any, steps: int) -> tuple[Pairs, list[int]]:
    """The press by itself: its own context manager, kvpress' global patch, explicit positions as its pipeline does.

    Returns what it kept of each layer, and the tokens decoded.
    """
    from kvpress.attention_patch import attention_patch

    cache, tokens = DynamicCache(), []
    original, trace = ALL_ATTENTION_FUNCTIONS["sdpa"], [set(vars(layer.self_attn)) for layer in model.model.layers]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention_patch(original)
    try:
        with torch.inference_mode():
            with press(model):
                logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits
            # Decoding writes over the keys of masked tokens.
            kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
            for step in range(steps):
                tokens.append(int(logits[0, -1].argmax()))
                position = torch.tensor([[prompt.shape[1] + step]])
                logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, position_ids=position).logits
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
        for layer, before in zip(model.model.layers, trace, strict=True):
            layer.self_attn._modules.pop("rotary_emb")
            for name in set(vars(layer.self_attn)) - before:
                delattr(layer.self_attn, name)
    return kept, tokens


def press(name: str, **budget: Any) -> Cell:
    """One cell, whose budget counts tokens."""
    return other_cell(f"kvpress:{name}", unit="tokens", **budget)


@torch.inference_mode()
def compress(model: Any, prompt: torch.Tensor, cell: Cell) -> Compressed:
    (recorded,) = record(model, prompt.tolist(), cell.recorded_queries)
    return cell.compress(model, recorded)


def token_counts(cell: Cell, cache: Any) -> dict[str, float]:
    return cell.impl.token_counts(cache)


def greedy(model: Any, cell: Cell, prefilled: Compressed, steps: int) -> list[int]:
    tokens, logits = [], prefilled.logits
    with cell.decoding(model, [prefilled.cache]), torch.inference_mode():
        for _ in range(steps):
            tokens.append(int(logits[0].argmax()))
            logits = model(torch.tensor([tokens[-1:]]), past_key_values=prefilled.cache).logits[:, -1]
    return tokens


@pytest.mark.parametrize("name", [*EVICTING, "chunkkv", "chunkkv+tova", "adakv"])
def test_a_press_does_what_it_does_by_itself(model: Any, prompt: torch.Tensor, name: str) -> None:
    """The same keys and values are kept, and decoding, masks of single heads included, goes on to the same tokens."""
    import kvpress

    inner = kvpress.TOVAPress() if name.endswith("+tova") else kvpress.SnapKVPress()
    wrappers = {"chunkkv": kvpress.ChunkKVPress, "adakv": kvpress.AdaKVPress}
    plain = {
        "snapkv": kvpress.SnapKVPress,
        "pyramidkv": kvpress.PyramidKVPress,
        "streaming_llm": kvpress.StreamingLLMPress,
        "expected_attention": kvpress.ExpectedAttentionPress,
        "tova": kvpress.TOVAPress,
        "knorm": kvpress.KnormPress,
    }
    outer = name.partition("+")[0]
    press = wrappers[outer](inner) if outer in wrappers else plain[outer]()
    cell = other_cell(f"kvpress:{name}", unit="tokens", cache_size=100)
    press.compression_ratio = 1 - 100.25 / LENGTH
    expected, tokens = alone(model, prompt, press, 8)
    prefilled = compress(model, prompt, cell)
    for layer, (keys, values) in zip(prefilled.cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert greedy(model, cell, prefilled, 8) == tokens


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("budget", [{"cache_size": 77}, {"cache_ratio": 0.5}], ids=str)
def test_the_budget_is_kept(model: Any, prompt: torch.Tensor, name: str, budget: dict[str, Any]) -> None:
    wanted = 77 if "cache_size" in budget else 101
    cell = other_cell(f"kvpress:{name}", unit="bytes", **budget)
    cache = compress(model, prompt, cell).cache
    counts = token_counts(cell, cache)
    assert counts["original"] == pytest.approx(wanted, abs=0.5)
    assert sum(counts.values()) == cache.get_seq_length() == LENGTH
    assert storage_bytes(cache.layers) == sum(
        2 * 2 * 32 * 4 * layer.keys.shape[2]  # key and value, heads, dimensions, bytes of a float
        for layer in cache.layers
    )


def test_a_press_that_masks_shows_its_real_bytes(model: Any, prompt: torch.Tensor) -> None:
    cell = press("adakv", cache_ratio=0.25)
    cache = compress(model, prompt, cell).cache
    full = 3 * 2 * 2 * 32 * 4 * LENGTH
    assert storage_bytes(cache.layers) > full
    assert token_counts(cell, cache)["original"] == pytest.approx(50, abs=0.01)
    assert token_counts(cell, cache)["evicted"] == pytest.approx(LENGTH - 50, abs=0.01)


@pytest.mark.parametrize(
    "name", ["snapkv+quanto-int4", "adakv+snapkv+quanto-int4", "adakv+tova+hqq-int4", "knorm+hqq-int2"]
)
def test_a_press_before_a_quantizer(model: Any, prompt: torch.Tensor, name: str) -> None:
    """A budget in bytes holds more tokens than at model precision, one in tokens as many; both are kept to."""
    full = 3 * 2 * 2 * 32 * 4 * LENGTH
    cells = [other_cell(f"kvpress:{name}", unit=unit, cache_ratio=0.08) for unit in ("bytes", "tokens")]
    made = [compress(model, prompt, cell) for cell in cells]
    kept = []
    for cell, prefilled in zip(cells, made, strict=True):
        counts = token_counts(cell, prefilled.cache)
        assert sum(counts.values()) == pytest.approx(LENGTH)
        kept.append(counts["original"] + counts["quantized"])
        ragged = cell.impl.ragged_bytes(prefilled.cache)
        assert (ragged is None) is ("adakv" not in name)
        assert (storage_bytes(prefilled.cache) if ragged is None else ragged) <= 1.02 * 0.08 * full
    assert kept[1] == pytest.approx(16, abs=0.5)
    assert kept[0] > 3 * kept[1]
    # What follows is near that of the press alone, whose tokens these are.
    alone = press(name.rpartition("+")[0], cache_ratio=0.08)
    with torch.inference_mode():
        prefilled = compress(model, prompt, alone)
        logits = []
        for cell, each in ((cells[1], made[1]), (alone, prefilled)):
            with cell.decoding(model, [each.cache]):
                logits.append(model(torch.tensor([[7]]), past_key_values=each.cache).logits[0, -1].log_softmax(-1))
    assert torch.nn.functional.kl_div(logits[0], logits[1], log_target=True, reduction="sum") < 0.3


def test_a_press_that_decodes_keeps_to_its_budget(model: Any, prompt: torch.Tensor) -> None:
    """Every so many tokens; copies of a cache go on where they stand, each with what it has seen."""
    cell = press("decoding[compression_interval=4]+knorm", cache_size=50)
    prefilled = compress(model, prompt, cell)
    assert token_counts(cell, prefilled.cache) == {"original": LENGTH, "quantized": 0.0, "evicted": 0.0}
    greedy(model, cell, prefilled, 3)
    twin = cell.fork(prefilled.cache)
    held = []
    for cache in (prefilled.cache, twin):
        with cell.decoding(model, [cache]), torch.inference_mode():
            model(torch.tensor([[5]]), past_key_values=cache)
        held.append(token_counts(cell, cache))
    assert held[0] == held[1] == {"original": 50.0, "quantized": 0.0, "evicted": LENGTH + 4 - 50}
    assert prefilled.cache.get_seq_length() == LENGTH + 4
    both = press("prefill_decoding[compression_interval=4]+knorm", cache_size=50)
    assert token_counts(both, compress(model, prompt, both).cache)["original"] == 50.0


@pytest.mark.parametrize("tokens", [50, 64])
def test_a_prompt_within_the_presses_window_stays_whole(model: Any, prompt: torch.Tensor, tokens: int) -> None:
    cell = press("snapkv", cache_ratio=0.25)
    cache = compress(model, prompt[:, :tokens], cell).cache
    assert token_counts(cell, cache) == {"original": tokens, "quantized": 0.0, "evicted": 0.0}


def test_a_press_that_draws_keeps_the_same_tokens_twice(model: Any, prompt: torch.Tensor) -> None:
    state = torch.get_rng_state()
    first, second = (compress(model, prompt, press("random", cache_size=50)).cache for _ in range(2))
    assert torch.equal(first.layers[0].keys, second.layers[0].keys)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", GROUPED)
def test_quantized_bytes_are_walked(model: Any, prompt: torch.Tensor, name: str) -> None:
    """Codes, scales and zero points counted from the shapes; what fills no group waits at model precision."""
    backend, bits = names.BACKENDS[name]
    cell = other_cell(f"hf:{name}", cache_ratio=0.25)
    cache = compress(model, prompt, cell).cache
    counts = token_counts(cell, cache)
    whole, waiting = round(counts["quantized"]), round(counts["original"])
    assert whole + waiting == LENGTH == cache.get_seq_length()
    assert waiting == LENGTH % {"hqq-int4": 2, "hqq-int2": 4}.get(name, 1)
    values = 2 * 32 * whole
    # Keys and values: codes, a scale and a zero point per 64 values, and the waiting tokens as floats.
    expected = 3 * 2 * (values * bits // 8 + 2 * 4 * values // 64 + 4 * 2 * 32 * waiting)
    assert storage_bytes(cache.layers) == pytest.approx(expected, rel=0.02)
    assert backend in name


@pytest.mark.parametrize("name", GROUPED)
def test_a_shared_prefill_is_its_own(model: Any, prompt: torch.Tensor, name: str) -> None:
    """Quantizing the recorded keys and values gives what transformers' cache gives in a prefill of its own."""
    from transformers.cache_utils import QuantizedCache

    backend, bits = names.BACKENDS[name]
    even, axis = prompt[:, :200], int(backend == "hqq")
    own = QuantizedCache(backend, model.config, bits, axis, axis)
    with torch.inference_mode():
        logits = model(even, past_key_values=own, logits_to_keep=1).logits[:, -1]
    cell = other_cell(f"hf:{name}")
    by_itself = Compressed(cache=own, logits=logits, prefill_s=0.0, compress_s=None, kv_bytes=0)
    assert greedy(model, cell, compress(model, even, cell), 8) == greedy(model, cell, by_itself, 8)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("name", GROUPED)
def test_decoding_past_the_next_quantization(model: Any, prompt: torch.Tensor, name: str) -> None:
    """After 128 more tokens everything is quantized again, whatever the length of the prompt."""
    cell = other_cell(f"hf:{name}")
    prefilled = compress(model, prompt, cell)
    greedy(model, cell, prefilled, 130)
    counts = token_counts(cell, prefilled.cache)
    assert counts["original"] < 10
    assert sum(counts.values()) == LENGTH + 130


@pytest.mark.skipif(not HAS_FP8, reason="this transformers has no fp8 backend")
def test_fp8_takes_a_byte_per_value(model: Any, prompt: torch.Tensor) -> None:
    cell = other_cell("hf:fp8", cache_ratio=0.25)
    prefilled = compress(model, prompt, cell)
    assert prefilled.cache.get_seq_length() == LENGTH
    assert token_counts(cell, prefilled.cache) == {"original": 0.0, "quantized": LENGTH, "evicted": 0.0}
    # Keys and values, and a scale for each.
    assert storage_bytes(prefilled.cache) == 3 * 2 * (2 * 32 * LENGTH + 4)
    greedy(model, cell, prefilled, 5)
    assert token_counts(cell, prefilled.cache)["quantized"] == LENGTH + 5
    assert cell.quant_format == "fp8"


@pytest.mark.skipif(HAS_FP8, reason="this transformers has an fp8 backend")
def test_fp8_says_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"hf:fp8: transformers 5\.\d+\.\d+ has no fp8 backend") as caught:
        other_cell("hf:fp8", cache_ratio=0.25)
    assert caught.value.exit_code == 2


def test_a_row_of_the_grid(tiny: Any) -> None:
    """Peers run beside the others in one engine, presses on a prefill of their own."""
    cells = grid(
        ["full", "mix", "hf:hqq-int4", "kvpress:streaming_llm"],
        [{"cache_ratio": 0.5}, {"cache_ratio": 0.25}],
        [8],
        None,
        {"budget_unit": "bytes"},
    )
    assert [cell.method for cell in cells] == [
        *("full", "mix", "mix", "hf:hqq-int4", "kvpress:streaming_llm", "kvpress:streaming_llm")
    ]
    assert [cell.cache_ratio for cell in cells] == [None, 0.5, 0.25, None, 0.5, 0.25]
    assert len({cell.key for cell in cells}) == len(cells)
    assert (cells[3].quant_format, cells[4].quant_format) == ("int4", None)
    assert cells[3].label == "hf:hqq-int4"
    assert cells[4].label == "kvpress:streaming_llm 50 % of each prompt's bytes"
    ids = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(tiny.model, tiny.tokenizer, cells)
    engine.warm_up()
    document = Document(id="d", request=Generate(prompt_ids=tuple(ids), max_new_tokens=4))
    full, _, _, quantized, half, quarter = engine.answer(document, cells)
    assert (full.tokens_evicted, quantized.tokens_evicted) == (0.0, 0.0)
    assert quantized.tokens_quantized > 190
    assert (half.tokens_evicted, quarter.tokens_evicted) == (100.0, 150.0)
    assert full.kv_bytes > half.kv_bytes > quarter.kv_bytes
    assert half.kv_bytes / full.kv_bytes == pytest.approx((100 + 3) / (200 + 3))
    assert quantized.prefill_s == full.prefill_s != half.prefill_s == quarter.prefill_s
    assert min(half.compress_s, quarter.compress_s) > 0
    assert len(half.answer.token_ids) == 4


def test_a_key_follows_the_librarys_version() -> None:
    first, second = (
        Cell("x:y", other_cell("kvpress:knorm").impl, Asked("tokens", 64), version).key for version in ("1.0", "1.1")
    )
    assert first != second


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:quanto-int3", "unknown method 'hf:quanto-int3': did you mean hf:quanto-int"),
        ("kvpress:snapkw", "unknown method 'kvpress:snapkw': did you mean kvpress:snapkv"),
        ("vllm:fp8", "unknown method 'vllm:fp8': third-party methods begin with hf: or kvpress:"),
        ("kvpress:duo_attention", "duo_attention cannot be compared at a budget: its heads, not a budget, say"),
        ("kvpress:finch[chunk_lenght=64]", "finch has no option 'chunk_lenght': did you mean chunk_length"),
        ("kvpress:kvzap", "kvzap is not offered, since it needs another model"),
        ("kvpress:snapkv+tova", "SnapKVPress wraps no other press"),
        ("kvpress:", "write it as kvpress:PRESS, kvpress:PRESS[option=value;option=value]"),
        ("kvpress:kvzip[", "write it as kvpress:PRESS"),
        ("kvpress:kvzip+", "write it as kvpress:PRESS"),
        ("kvpress:quanto-int4", "quanto-int4 takes no options and stands behind a press"),
        ("kvpress:kvzip+fp8", "fp8 takes one scale for a whole layer: use quanto or hqq"),
        ("kvpress:kvzip[chunk_sise=64]", "kvzip has no option 'chunk_sise': did you mean chunk_size"),
        ("kvpress:kvzip[chunk_size=many]", "chunk_size is an integer, not 'many'"),
        ("kvpress:kvzip[layerwise=1]", "layerwise is true or false, not '1'"),
        ("kvpress:kvzip[layerwise]", "options are written as [option=value;option=value], each once"),
        ("kvpress:kvzip[n_sink=1;n_sink=2]", "options are written as [option=value;option=value], each once"),
        ("kvpress:knorm[compression_ratio=0.5]", "compression_ratio is not an option: the budget says it"),
        ("kvpress:decoding[target_size=5]+knorm", "target_size is not an option: the budget says it"),
        ("kvpress:decoding+knorm+quanto-int4", "what is compressed while decoding would be quantized anew each time"),
        ("kvpress:chunkkv+adakv", "AdaKVPress gives tokens no score"),
    ],
)
def test_wrong_names(name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        other_cell(name, unit="tokens", cache_size=64)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["hf:hqq-int4", "kvpress:snapkv"])
def test_what_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTIONS", dict.fromkeys(names.DISTRIBUTIONS, "no-such-distribution"))
    with pytest.raises(UserError, match=r"is not installed: make env in the checkout, or pip install .* '\.\[peers\]'"):
        other_cell(name)


def test_a_press_that_masks_frees_bytes_only_where_it_quantizes() -> None:
    assert "frees no bytes" in names.limits_of("kvpress:kvzip")
    assert "only quantizing frees bytes" in names.limits_of("kvpress:kvzip+quanto-int4")
    assert names.limits_of("kvpress:snapkv+quanto-int4") == names.AT_PREFILL


def test_a_press_that_cannot_do_the_model_says_why(
    model: Any, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises, it is the failure of one cell in one document."""
    import kvpress as library

    cell = press("knorm", cache_size=50)
    for kind, said in (
        (AssertionError, "kvpress:knorm: kvpress cannot do a prompt of 203 tokens with this model: no such head"),
        # With the place, where it is an error that nobody has foreseen.
        (IndexError, "kvpress:knorm: IndexError: no such head (test_peers.py, line N)"),
        (AttributeError, "kvpress:knorm: AttributeError: no such head (test_peers.py, line N)"),
    ):

        def failing(*_: Any, kind: type[Exception] = kind, **__: Any) -> Any:
            raise kind("no such\nhead")

        monkeypatch.setattr(library.KnormPress, "score", failing)
        with pytest.raises(UserError) as caught:
            compress(model, prompt, cell)
        assert re.sub(r"line \d+", "line N", str(caught.value)) == said


def test_the_table_of_presses_is_that_of_the_library() -> None:
    """Without an import of it, the suite knows all presses, by the names of their modules."""
    library: Any = pytest.importorskip("kvpress")
    classes = [
        item for item in vars(library).values() if isinstance(item, type) and issubclass(item, library.BasePress)
    ]
    modules = Counter(item.__module__ for item in classes)
    known = {
        item.__module__.rpartition(".")[2].removesuffix("_press")
        if modules[item.__module__] == 1
        else item.__name__.lower().removesuffix("press"): item.__name__
        for item in classes
    }
    assert {name: press.class_name for name, press in names.PRESSES.items()} == known
    assert list(names.PRESSES) == sorted(names.PRESSES)


def test_what_a_press_that_decodes_cannot_meet_names_its_interval() -> None:
    for options, tokens in (("", 512), ("[compression_interval=8]", 8)):
        assert f"every {tokens} tokens" in names.limits_of(f"kvpress:decoding{options}+knorm")


def test_every_press_is_usable_or_has_a_reason() -> None:
    rows = dict(names.descriptions())
    assert {"snapkv", "kvzip"} <= set(names.usable_presses())
    assert "snapkv" in rows["kvpress:NAME"]
    assert "duo_attention" not in rows["kvpress:NAME"]
    assert "--question before" in rows["kvpress:finch"]
    assert "qfilter (filters computed for the model, a download)" in rows["kvpress:..."]
    for name, press in names.PRESSES.items():
        if not press.usable:
            with pytest.raises(UserError, match=f"kvpress:{name}: {name} (cannot be compared|is not offered)"):
                other_cell(f"kvpress:{name}", unit="tokens", cache_size=64)


def test_compiling_quantos_kernels_is_no_silent_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from optimum.quanto.library.extensions import get_extension

    keys = torch.zeros(1, 2, 64, 64)
    monkeypatch.setattr(get_extension("quanto_cpp"), "build_directory", str(tmp_path))
    said = []
    for built in (False, True):
        if built:
            (tmp_path / "pytorch_version.txt").write_text(torch.__version__)
        hf._announce_compiling.cache_clear()
        for _ in range(2):
            layer = cache_utils.QuantoQuantizedLayer(4, **hf.layer_settings("quanto"))
            hf.fill(layer, keys, keys, "quanto", 4)
        said.append(capsys.readouterr().err.count("Compiling quanto's kernels, once for this environment"))
    hf._announce_compiling.cache_clear()
    assert said == [1, 0]
