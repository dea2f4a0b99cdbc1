#!/usr/bin/env python
"""What ranks tokens, who competes, and which formats: variants of a compressed context, simulated at equal bytes.

    scripts/simulate.py --outdir results/quality/simulated

A context of RULER's ``niah_multikey_2`` is read once and read again; then each variant says of every token of every KV
head whether it is Original, in a Quantized format or Evicted, and several questions about the context are read through
what that leaves, with their right answers: attention to the context is to the tokens that stay, as their format has
them. Nothing is evicted while questions are read. Bytes are counted as the cache counts them: keys, values, scales,
positions, scores, channel means and rows; a variant whose newest tokens alone take more has no row. ``oracle`` ranks
tokens by the attention of the question itself.

A row is one variant at one share of the bytes: answers whose every token is the most likely one, the mean negative
log-likelihood of an answer's tokens, and their divergence from those of the full cache. Writes ``simulated.csv`` and
``record.json``.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from arkv import CacheConfig, PrefillCache, attach, replay
from arkv.formats import FORMATS, Format
from arkv.formats.uniform import uniform
from arkv.prefill import PrefillLayer
from arkv.store import row_table_bytes
from bench.models.loading import LoadedModel, load
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records
from tasks.base import Generate, TaskSettings
from tasks.ruler.definitions import DEFINITIONS
from tasks.ruler.task import RulerTask

K3V2 = uniform("k3v2", 3, 2)
ORIGINAL, EVICTED = -1, -2
"""States of a token beside 0, 1, ...: the formats of a variant in their order."""
POSITION_BYTES, SCORE_BYTES = 2, 4
NUMBER_BYTES = 2
"""Of a number in the full cache, whose share a budget is: bfloat16, whatever the simulation computes in."""
COLUMNS = ["variant", "ratio", "answers", "right", "nll", "kl", "held"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a context is compressed."""

    name: str
    importance: str = "replay / stream"
    """One of those of :meth:`Context.importance`."""
    compete: str = "all"
    """``heads``: none; ``layer``; ``all``."""
    formats: tuple[tuple[Format, float], ...] = ((FORMATS["k4v3"], 1.0),)
    """Each with its share of the bytes, for the most important tokens first."""
    original_share: float = 0.0
    sure_share: float = 0.1
    n_recent: int = 4
    n_sink: int = 4
    slot_bytes: int = POSITION_BYTES + SCORE_BYTES


VARIANTS = (
    Variant(name="base"),
    Variant(name="replay", importance="replay"),
    Variant(name="replay x value norm / stream", importance="replay x value norm / stream"),
    Variant(name="window", importance="window"),
    Variant(name="window, heads", importance="window", compete="heads"),
    Variant(name="heads", compete="heads"),
    Variant(name="heads of a layer", compete="layer"),
    Variant(name="nothing quantized", formats=(), original_share=1.0),
    Variant(name="original share 0.05", original_share=0.05),
    Variant(name="no sure share", sure_share=0.0),
    Variant(name="sure share 0.3", sure_share=0.3),
    Variant(name="32 recent", n_recent=32),
    Variant(name="1 recent", n_recent=1),
    Variant(name="int4", formats=((FORMATS["int4"], 1.0),)),
    Variant(name="k3v2", formats=((K3V2, 1.0),)),
    Variant(name="int2", formats=((FORMATS["int2"], 1.0),)),
    Variant(name="half k4v3, half k3v2", formats=((FORMATS["k4v3"], 0.5), (K3V2, 0.5))),
    Variant(name="half k4v3, half int2", formats=((FORMATS["k4v3"], 0.5), (FORMATS["int2"], 0.5))),
    Variant(name="16-bit score, no position", slot_bytes=2),
    Variant(name="oracle", importance="oracle"),
)


class Held(NamedTuple):
    """What a layer's attention reads of the context: keys and values [H, N, D], and 0 or -inf for each, [H, N]."""

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor


@dataclass
class Reading:
    """What :func:`simulated_attention` reads, and what it has seen."""

    held: Sequence[Held] = ()
    watch: bool = False
    seen: list[torch.Tensor] = field(default_factory=list)
    """Of every layer the largest attention that a token of the context got, [H, N]."""


STATE = Reading()


def simulated_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [B, T, Hq, D] of a question's tokens to what is held of the context and, causally, to one another."""
    held: Held = STATE.held[int(module.layer_idx)]  # type: ignore[arg-type]
    batch, query_heads, new, dim = query.shape
    heads = key.shape[1]
    grouped = query.view(batch, heads, query_heads // heads, new, dim).float() * scaling
    far = torch.einsum("bhgnd,hkd->bhgnk", grouped, held.key) + held.bias[:, None, None]
    near = torch.einsum("bhgnd,bhkd->bhgnk", grouped, key.float())
    near = near.masked_fill(torch.ones(new, new, dtype=torch.bool).triu(1), float("-inf"))
    weights = torch.softmax(torch.cat([far, near], dim=-1), dim=-1)
    length = held.key.shape[1]
    if STATE.watch:
        STATE.seen.append(weights[..., :length].amax(dim=(0, 2, 3)))
    output = torch.einsum("bhgnk,hkd->bhgnd", weights[..., :length], held.value)
    output += torch.einsum("bhgnk,bhkd->bhgnd", weights[..., length:], value.float())
    return output.reshape(batch, query_heads, new, -1).transpose(1, 2).to(query.dtype).contiguous(), None


class Question(NamedTuple):
    """A question about a context and its right answer."""

    ids: list[int]
    answer: list[int]


class Context:
    """A context that has been read twice, with questions about it."""

    def __init__(self, loaded: LoadedModel, ids: Sequence[int], questions: Sequence[Question]) -> None:
        self.model, self.questions, self.length = loaded.model, list(questions), len(ids)
        config = CacheConfig.for_method("mix", budget_unit="bytes", cache_ratio=0.25, importance="replay")
        window = CacheConfig.for_method("mix", budget_unit="bytes", cache_ratio=0.25)
        prompt = torch.tensor([list(ids)])
        prefill = PrefillCache(self.model, window.recorded_queries)
        with torch.no_grad(), attach(self.model):
            self.model.base_model(prompt, past_key_values=prefill)
        prefill.score(window)
        replay(self.model, prompt, prefill, config)
        layers = [layer for layer in prefill.layers if isinstance(layer, PrefillLayer)]
        self.states = [tuple(item[0].float() for item in layer.states()) for layer in layers]
        again = [layer.scores[config.scoring] for layer in layers]
        self.scores = {
            "window": torch.stack([layer.scores[window.scoring].importance[0] for layer in layers]),
            "replay": torch.stack([scores.importance[0] for scores in again]),
        }
        self.streams = torch.tensor([scores.stream[0] for scores in again])[:, None, None]
        self._coded: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def importance(self, name: str, question: Question) -> torch.Tensor:
        """Of every token, [L, H, N]."""
        if name == "oracle":
            return self.by_question(question) / self.streams
        if name == "replay / stream":
            return self.scores["replay"] / self.streams
        if name == "replay x value norm / stream":
            norms = torch.stack([value.norm(dim=-1) for _, value in self.states])
            return self.scores["replay"] * norms / self.streams
        return self.scores[name]

    def by_question(self, question: Question) -> torch.Tensor:
        """The largest attention that a question and its answer give, [L, H, N]."""
        STATE.watch, STATE.seen = True, []
        self.read(self.whole(), [question])
        STATE.watch = False
        return torch.stack(STATE.seen)

    def whole(self) -> list[Held]:
        """Everything."""
        return [Held(key, value, torch.zeros(key.shape[:2])) for key, value in self.states]

    def coded(self, number_format: Format, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer [H, N, D] as a format has them."""
        place = (number_format.name, layer)
        if place not in self._coded:
            key, value = self.states[layer]
            center = key.mean(dim=1, keepdim=True).bfloat16().float().expand_as(key).flatten(0, 1)
            flat = key.flatten(0, 1)
            keys = number_format.key.decode(number_format.key.encode(flat, center), center)
            values = number_format.value.decode(number_format.value.encode(value.flatten(0, 1)))
            self._coded[place] = keys.view_as(key), values.view_as(value)
        return self._coded[place]

    def compressed(self, variant: Variant, ratio: float, question: Question) -> tuple[list[Held], float]:
        """What a variant leaves within ``ratio`` of the bytes, and the share of tokens that it holds."""
        states = self.chosen(variant, ratio, self.importance(variant.importance, question))
        found = []
        for layer, (key, value) in enumerate(self.states):
            keys, values = key.clone(), value.clone()
            for number, (number_format, _) in enumerate(variant.formats):
                mine = states[layer] == number
                coded = self.coded(number_format, layer)
                keys[mine], values[mine] = coded[0][mine], coded[1][mine]
            bias = torch.zeros(key.shape[:2]).masked_fill(states[layer] == EVICTED, float("-inf"))
            found.append(Held(keys, values, bias))
        return found, float((states != EVICTED).float().mean())

    def left(self, variant: Variant, ratio: float) -> float:
        """Bytes of a KV head beside those of the newest tokens and the first ones; below 0 where these do not fit."""
        dims = [item.shape[-1] for item in self.states[0]]
        original = sum(dims) * NUMBER_BYTES
        once = row_table_bytes(2 if variant.formats else 1)
        once += (variant.n_recent + variant.n_sink) * (original + variant.slot_bytes)
        once += max((number_format.bytes_per_head(dims[0]) for number_format, _ in variant.formats), default=0)
        return ratio * self.length * original - once

    def chosen(self, variant: Variant, ratio: float, importance: torch.Tensor) -> torch.Tensor:
        """The state of every token, [L, H, N]."""
        layers, heads, length = importance.shape
        dims = [item.shape[-1] for item in self.states[0]]
        slot = sum(dims) * NUMBER_BYTES + variant.slot_bytes
        left = self.left(variant, ratio)
        past = slice(variant.n_sink, length - variant.n_recent)
        states = torch.full(importance.shape, ORIGINAL)
        groups = {"heads": layers * heads, "layer": layers, "all": 1}[variant.compete]
        scores = importance[..., past].reshape(groups, -1, length - variant.n_recent - variant.n_sink)
        rows = scores.shape[1]
        counts = [(ORIGINAL, int(variant.original_share * left * rows / slot))]
        for number, (number_format, share) in enumerate(variant.formats):
            each = number_format.bytes_per_token(dims[0], dims[1]) + variant.slot_bytes
            counts.append((number, int((1 - variant.original_share) * share * left * rows / each)))
        total = sum(count for _, count in counts)
        found = torch.full(scores.shape, EVICTED)
        for group, mine in zip(found, scores, strict=True):
            sure = min(int(variant.sure_share * total / rows), mine.shape[1])
            raised = mine.scatter(1, mine.topk(sure, dim=1).indices, float("inf"))
            kept = raised.flatten().topk(min(total, raised.numel())).indices
            # Whatever a head is sure of, the best of those that are kept have the best states.
            kept = kept[mine.flatten()[kept].argsort(descending=True)]
            begin = 0
            for state, count in counts:
                group.view(-1)[kept[begin : begin + count]] = state
                begin += count
        states[..., past] = found.view(layers, heads, -1)
        return states

    @torch.no_grad()
    def read(self, held: Sequence[Held], questions: Sequence[Question]) -> list[torch.Tensor]:
        """Log-probabilities [T, V] before each token of every answer."""
        STATE.held = held
        rows = [[*question.ids, *question.answer] for question in questions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        positions = torch.arange(self.length, self.length + longest).expand_as(ids)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("simulated")
        hidden = self.model.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state
        self.model.set_attn_implementation(before)
        spans = [(len(question.ids) - 1, len(row) - 1) for question, row in zip(questions, rows, strict=True)]
        logits = [self.model.lm_head(hidden[number, slice(*span)]) for number, span in enumerate(spans)]
        return [torch.log_softmax(item.float(), dim=-1) for item in logits]


def contexts(loaded: LoadedModel, length: int, count: int, questions: int, seed: int) -> Iterator[Context]:
    """Contexts with keyed numbers, and questions about several of them."""
    task, tokenizer = RulerTask(DEFINITIONS["niah_multikey_2"]), loaded.tokenizer
    settings = TaskSettings(
        tokenizer=tokenizer,
        max_length=2 * length,
        seed=seed,
        question="after",
        options={"lengths": (length,), "samples": count},
    )
    for document in task.load(settings):
        assert isinstance(document.request, Generate)
        text = tokenizer.decode(document.request.prompt_ids)
        pairs = re.findall(r"special magic numbers? for (\S+) is: (\d+)\.", text)
        asked = tokenizer.decode(document.request.question_ids)
        (key,) = {key for key, _ in pairs if f"for {key} mentioned" in asked}
        random.Random(f"{seed} {document.id}").shuffle(pairs)
        mine = [
            Question(
                tokenizer(asked.replace(key, other), add_special_tokens=False)["input_ids"],
                tokenizer(f" {number}", add_special_tokens=False)["input_ids"],
            )
            for other, number in pairs[:questions]
        ]
        yield Context(loaded, document.request.prompt_ids, mine)


def measured(context: Context, variant: Variant | None, ratio: float) -> list[tuple[torch.Tensor, float]]:
    """Log-probabilities of every answer, and the share of the context's tokens that was held for it."""
    if variant is None:
        return [(item, 1.0) for item in context.read(context.whole(), context.questions)]
    if variant.importance != "oracle":
        held, share = context.compressed(variant, ratio, context.questions[0])
        return [(item, share) for item in context.read(held, context.questions)]
    found = []
    for question in context.questions:
        held, share = context.compressed(variant, ratio, question)
        found += [(item, share) for item in context.read(held, [question])]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--ratios", default="0.125,0.0625,0.04")
    parser.add_argument("--outdir", type=Path, default=Path("runs/simulated"))
    options = parser.parse_args(arguments)
    AttentionInterface.register("simulated", simulated_attention)
    loaded = load(options.model, dtype="float32")
    cells = [(None, 1.0), *((variant, float(ratio)) for ratio in options.ratios.split(",") for variant in VARIANTS)]
    found: dict[tuple[str, float], list[tuple[float, ...]]] = {}
    made = contexts(loaded, options.length, options.contexts, options.questions, options.seed)
    for number, context in enumerate(made, 1):
        whole = context.read(context.whole(), context.questions)
        for variant, ratio in cells:
            if variant is not None and context.left(variant, ratio) < 0:
                continue
            rows = found.setdefault((variant.name if variant else "full", ratio), [])
            outcomes = zip(context.questions, whole, measured(context, variant, ratio), strict=True)
            for question, reference, (scores, share) in outcomes:
                answer = torch.tensor(question.answer)
                right = bool((scores.argmax(dim=-1) == answer).all())
                nll = -scores.gather(1, answer[:, None]).mean().item()
                kl = (reference.exp() * (reference - scores)).sum(dim=-1).mean().item()
                rows.append((float(right), nll, kl, share))
        print(f"context {number} of {options.contexts}: {len(cells)} variants", flush=True)
    lines = []
    for (name, ratio), rows in found.items():
        if len(rows) < len(found["full", 1.0]):
            # Some context is too short for it.
            continue
        right, nll, kl, share = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        lines.append([name, ratio, len(rows), round(right * len(rows)), f"{nll:.4f}", f"{kl:.4f}", f"{share:.4f}"])
    settings = {name: value for name, value in vars(options).items() if name != "outdir"}
    # Before the table, which is new in the working tree.
    record = {"settings": settings, "finished": records.now(), **records.environment()}
    options.outdir.mkdir(parents=True, exist_ok=True)
    write_atomic(options.outdir / "simulated.csv", csv_text(COLUMNS, lines))
    write_atomic(options.outdir / "record.json", json_text(record))
    for line in lines:
        print(*line, sep="  ")


if __name__ == "__main__":
    main()
