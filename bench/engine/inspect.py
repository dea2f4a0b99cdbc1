"""A look inside a cache: which tokens each head kept, what decoding changed, and what a tri-state layer measured.

Letters: ``L`` compressible layers, ``H`` KV heads, ``N`` tokens seen, ``W`` window.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from arkv import CacheConfig, PrefillCache
from arkv.layer import TriStateLayer
from arkv.prefill import PrefillLayer
from arkv.scores import Prompt, oq_ratios, oq_score
from bench.engine.decoding import Decoder
from bench.engine.jobs import FAILURES, in_a_line
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.methods.reading import forward, record
from bench.methods.states import EVICTED, ORIGINAL, QUANTIZED
from bench.models.loading import LoadedModel
from bench.names import FULL
from bench.records.states import StatesMap, read_maps
from tasks.base import Compare, Document, Generate, LogLikelihood

BINS = 96
"""Columns of a states map: neighbours in a longer prompt share one."""
NAMED = 3
"""Tokens that are named of those which a step demoted or evicted."""


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What the prompt's window says of one layer, and what its budget became."""

    layer: int
    entropy: float
    variance: float
    kurtosis: float
    oq_score: float
    oq_ratio: float
    budget: int
    """Tokens that the layer's budget holds per KV head while all are Original."""
    original_slots: int
    """Beside the window, per KV head."""
    quantized_slots: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decoding step. Lists are by layer, means over KV heads."""

    token: str
    """The token that was read."""
    original: list[float]
    quantized: list[float]
    evicted: list[float]
    demoted: list[float]
    """Tokens that became Quantized in this step."""
    lost: list[float]
    """Tokens that became Evicted in this step."""
    most_demoted: list[tuple[int, int]]
    """Positions that most heads of all layers demoted, and how many did."""
    most_lost: list[tuple[int, int]]
    """Likewise evicted."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a method did to one prompt."""

    model: str
    source: str
    """Of the prompt."""
    label: str
    """Of the method."""
    uses_oq: bool
    window_size: int
    pieces: list[str]
    """Text of each token of the prompt, then of those read behind it."""
    prompt_tokens: int
    layers: list[int]
    """Places of the compressible layers in the model."""
    statistics: list[LayerStatistics]
    """Of each of them, where the method is the tri-state cache."""
    states: torch.Tensor
    """After the prompt, [L, H, N] of :data:`EVICTED`, :data:`QUANTIZED` and :data:`ORIGINAL`."""
    final_states: torch.Tensor
    """After the last step."""
    steps: list[Step]

    @property
    def compressed(self) -> bool:
        """Whether any token of the prompt was quantized or evicted."""
        return bool((self.states != ORIGINAL).any())


@dataclass(frozen=True, kw_only=True)
class Word:
    """A run of tokens up to the next white space, and how many heads of all layers hold all of it."""

    text: str
    position: int
    """Of its first token."""
    kept: int
    """Heads that hold every token of it."""
    original: int
    """Those of them that hold every token as Original."""


# --- Looking ---


@torch.inference_mode()
def inspect_prompt(
    model: Any,
    tokenizer: Any,
    cell: Cell,
    ids: Sequence[int],
    *,
    steps: int,
    continuation: Sequence[int] | None = None,
    names: Mapping[str, str],
    prefill_chunk: int | None = None,
) -> Inspection:
    """Compress a prompt, then decode, and note every state.

    Args:
        model: a transformers causal language model in eval mode.
        cell: the method.
        ids: the prompt.
        steps: decoding steps at most; greedy decoding ends at an end-of-sequence token.
        continuation: tokens to be read in the place of the model's own.
        names: ``model``, ``source`` and ``label`` of the result.
        prefill_chunk: tokens of the prompt that are read in one forward; None for all.

    Raises:
        arkv.ConfigError: the cache cannot be made for this model or prompt.
        UserError: the method's cache does not know which tokens it holds.
    """
    (prompt,) = record(model, [ids], cell.recorded_queries, prefill_chunk)
    compressed = cell.compress(model, prompt)
    cache, logits = compressed.cache, compressed.logits
    assert logits is not None
    layers, before = known_states(cell, cache)
    first = before
    following: list[int] = []
    noted = []
    decoder = None
    if continuation is None and steps:
        # The answer would go on behind the last token that is read.
        decoder = Decoder(model, tokenizer, Generate(prompt_ids=tuple(ids), max_new_tokens=steps + 1))
    for place in range(steps):
        if decoder is not None:
            token = decoder.choose(logits)
            if decoder.ends_with([token]):
                break
        elif continuation is not None and place < len(continuation):
            token = continuation[place]
        else:
            break
        with cell.decoding(model, [cache]):
            logits = forward(model, [cache], [[token]])[:, -1]
        _, after = known_states(cell, cache)
        following.append(token)
        noted.append((before, after))
        before = after
    pieces = token_pieces(tokenizer, [*ids, *following])
    config = cell.cache_config
    # Of the statistics, which may see more of the newest tokens than stay at model precision.
    window = cell.window_size if config is None else config.window_size
    return Inspection(
        **names,
        uses_oq=config is not None and config.uses_oq,
        window_size=min(window or 0, len(ids)),
        pieces=pieces,
        prompt_tokens=len(ids),
        layers=layers,
        statistics=[] if config is None else layer_statistics(prompt.cache, cache, config),
        states=first,
        final_states=before,
        steps=[_step(pieces[len(ids) + place], *states) for place, states in enumerate(noted)],
    )


def known_states(cell: Cell, cache: Cache) -> tuple[list[int], torch.Tensor]:
    """Places of the layers that can be compressed, and the state of every token seen in each, int8 [L, H, N].

    Raises:
        UserError: the method's cache does not know which tokens it holds.
    """
    codes = cell.states(cache)
    if not codes:
        raise UserError(f"{cell.method}: its cache does not know which tokens it holds, so there is no map of them")
    return list(codes), torch.stack(list(codes.values()))


def layer_statistics(prefill: PrefillCache, cache: Cache, config: CacheConfig) -> list[LayerStatistics]:
    """Statistics and budgets of every layer of a tri-state cache, whether the method uses its OQ score or not."""
    found = []
    for place, (source, layer) in enumerate(zip(prefill.layers, cache.layers, strict=True)):
        if not isinstance(source, PrefillLayer) or not isinstance(layer, TriStateLayer):
            continue
        keys, values = source.states()
        prompt = Prompt(
            source.queries,
            keys,
            values,
            new=keys.shape[2],
            window=config.window_size,
            scaling=source.scaling,
            sinks=torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device),
            moments=True,
        )
        measured = prompt.near.layer
        assert measured is not None
        score = float(oq_score(measured, config.tau1, config.tau2, config.tau3))
        found.append((place, layer, measured[0].tolist(), score))
    ratios = oq_ratios([score for *_, score in found])
    return [
        LayerStatistics(
            layer=place,
            entropy=measured[0],
            variance=measured[1],
            kurtosis=measured[2],
            oq_score=score,
            oq_ratio=ratio,
            budget=layer.limits[0],
            original_slots=layer.slots[0].original,
            quantized_slots=layer.slots[0].quantized,
        )
        for (place, layer, measured, score), ratio in zip(found, ratios, strict=True)
    ]


def _step(token: str, before: torch.Tensor, after: torch.Tensor) -> Step:
    old = after[..., : before.shape[-1]]
    demoted = (before == ORIGINAL) & (old == QUANTIZED)
    lost = (before != EVICTED) & (old == EVICTED)

    def by_layer(chosen: torch.Tensor) -> list[float]:
        return chosen.sum(dim=-1).float().mean(dim=-1).tolist()

    return Step(
        token=token,
        original=by_layer(after == ORIGINAL),
        quantized=by_layer(after == QUANTIZED),
        evicted=by_layer(after == EVICTED),
        demoted=by_layer(demoted),
        lost=by_layer(lost),
        most_demoted=_most(demoted),
        most_lost=_most(lost),
    )


def _most(chosen: torch.Tensor) -> list[tuple[int, int]]:
    heads = chosen.sum(dim=(0, 1)).tolist()
    return [(place, count) for place, count in Counter(dict(enumerate(heads))).most_common(NAMED) if count]


# --- Text ---


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token. Of a character that several tokens share, the last one has it and the others are empty."""
    pieces: list[str] = []
    pending: list[int] = []
    for place, token in enumerate(ids):
        pending.append(token)
        # Some tokenizers drop the space before a first word: so never decode a word as the first.
        lead = list(ids[max(place - len(pending), 0) : place - len(pending) + 1])
        start = tokenizer.decode(lead) if lead else ""
        text = tokenizer.decode([*lead, *pending])[len(start) :]
        if text.endswith("�") and len(pending) < 4 and place + 1 < len(ids):
            pieces.append("")
            continue
        pieces.append(text)
        pending = []
    return pieces


def words(inspection: Inspection) -> list[Word]:
    """The words of the prompt with the heads that hold them after compression."""
    codes = inspection.states
    found = []
    for begin, end in _runs(inspection.pieces[: inspection.prompt_tokens]):
        part = codes[:, :, begin:end]
        found.append(
            Word(
                text="".join(inspection.pieces[begin:end]),
                position=begin,
                kept=int((part != EVICTED).all(dim=-1).sum()),
                original=int((part == ORIGINAL).all(dim=-1).sum()),
            )
        )
    return found


def _runs(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of pieces that stands between white space."""
    begin = 0
    for place in range(1, len(pieces) + 1):
        if place == len(pieces) or pieces[place][:1].isspace() or pieces[place - 1][-1:].isspace():
            yield begin, place
            begin = place


# --- Maps ---


def states_map(codes: torch.Tensor, layers: Sequence[int], bins: int = BINS) -> StatesMap:
    """Shares of ``codes`` [L, H, N] in at most ``bins`` bins."""
    tokens = codes.shape[-1]
    bins = min(bins, tokens)
    edges = [tokens * place // bins for place in range(bins + 1)]

    def shares(code: int) -> list[list[float]]:
        by_token = (codes == code).float().mean(dim=1)
        columns = [by_token[:, low:high].mean(dim=1) for low, high in itertools.pairwise(edges)]
        return [[round(value, 3) for value in row] for row in torch.stack(columns, dim=1).tolist()]

    return StatesMap(
        tokens=tokens,
        heads=codes.shape[1],
        layers=list(layers),
        original=shares(ORIGINAL),
        quantized=shares(QUANTIZED),
    )


def prompt_of(document: Document) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Token ids that a request of a document compresses, and those that are read behind them, if they are given.

    Of several contexts it is the first.
    """
    request = document.request
    if isinstance(request, Generate):
        return request.prompt_ids, None
    if isinstance(request, Compare):
        return request.context_ids[:-1], request.context_ids[-1:] + request.continuation_ids
    if isinstance(request, LogLikelihood):
        first = request.continuations[0]
        if first.question_ids:
            return first.context_ids, first.question_ids + first.token_ids
        return first.context_ids[:-1], first.context_ids[-1:] + first.token_ids
    window = request.windows[0]
    ids = window.context_ids + window.token_ids[:-1]
    prompt = min(max(1, int(request.prefill_share * len(ids))), len(ids) - 1)
    return ids[:prompt], ids[prompt:]


def cells_to_map(folder: Path, model: str, task: str, document: Document, cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose states map of a document the folder lacks, as far as their methods may know it; none for a prompt
    too short for one."""
    known = {
        item.cell for item in read_maps(folder) if (item.model, item.task, item.document) == (model, task, document.id)
    }
    if len(prompt_of(document)[0]) < 2:
        return []
    return [cell for cell in cells if cell.method != FULL and cell.impl.knows_states and cell.key not in known]


@torch.inference_mode()
def map_states(
    model: LoadedModel, document: Document, cells: Sequence[Cell], prefill_chunk: int | None = None
) -> dict[str, StatesMap]:
    """What cells make of a document's prompt, by the cell's key.

    Cells that cannot compress the prompt are left out, all of them where the model cannot read it: the run itself has
    recorded their failures. So are those whose caches do not know which tokens they hold.
    """
    ids, _ = prompt_of(document)
    most = max(cell.recorded_queries for cell in cells)
    maps: dict[str, StatesMap] = {}
    try:
        with in_a_line():
            (prompt,) = record(model.model, [ids], most, prefill_chunk)
    except FAILURES:
        return maps
    for cell in cells:
        try:
            with in_a_line():
                layers, codes = known_states(cell, cell.compress(model.model, prompt).cache)
        except FAILURES:
            continue
        maps[cell.key] = states_map(codes, layers)
    return maps
