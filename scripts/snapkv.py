#!/usr/bin/env python
"""Why ``kvpress:snapkv`` finds fewer passkeys than ``origin``: both beside kvpress' own pipeline, on the same prompts.

    scripts/snapkv.py --outdir results/snapkv

For every prompt each variant answers, and its share of (layer, KV head) pairs that hold *every* token of the number is
counted where the prompt has been read. kvpress' pipeline gets the suite's own tokens (all but the last as context, the
last as question), also with a shorter window of queries, and the prompt as its users would give it, with the question
behind the context. Writes ``snapkv.csv`` and ``record.json``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.engine.engine import Engine, Failure
from bench.errors import UserError
from bench.methods.grid import Cell, grid
from bench.methods.kvpress import library
from bench.methods.states import EVICTED
from bench.models.loading import LoadedModel, load
from bench.records.files.csv_ import csv_text
from bench.records.files.json_ import json_text
from bench.records.files.text import write_atomic
from bench.runs import folder as records
from tasks.base import Document, Generate, Generated, TaskSettings
from tasks.needle import NeedleTask

SNAPKV = "kvpress:snapkv"
COLUMNS = ["variant", "document", "number", "answer", "right", "heads_with_number"]
VARIANTS: dict[str, dict[str, Any]] = {"as given": {}, "window 8": {"window_size": 8}}
"""Settings of SnapKV beside its own, a window of 64 queries and a kernel of 5."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--cache-ratio", type=float, default=0.25)
    parser.add_argument("--outdir", type=Path, default=Path("runs/snapkv"))
    return parser.parse_args(arguments)


class Asked:
    """A prompt, and where its number stands."""

    def __init__(self, model: LoadedModel, document: Document) -> None:
        assert isinstance(document.request, Generate)
        self.document, self.ids = document, list(document.request.prompt_ids)
        self.new_tokens = document.request.max_new_tokens
        begin = document.info["needle_token"]
        pieces = [model.tokenizer.decode([token]) for token in self.ids[begin : begin + 60]]
        text, places = "", []
        for place, piece in enumerate(pieces):
            places += [place] * len(piece)
            text += piece
        at = text.index(str(document.reference))
        self.number = sorted({begin + place for place in places[at : at + len(str(document.reference))]})
        """Places of its tokens in the prompt."""


def recording(press: type, **settings: Any) -> Any:
    """A press that remembers which tokens each layer's heads keep, [H, kept] each."""

    class Recording(press):  # type: ignore[misc]
        def score(self, *arguments: Any, **more: Any) -> torch.Tensor:
            scores: torch.Tensor = super().score(*arguments, **more)
            count = int(scores.shape[-1] * (1.0 - self.compression_ratio))
            self.kept.append(scores[0].topk(count, dim=-1).indices)
            return scores

    made = Recording(**settings)
    made.kept = []
    return made


def share(held: Sequence[torch.Tensor]) -> float:
    """Of all (layer, KV head) pairs, those that hold every token of the number; ``held`` [H] of each layer."""
    return torch.cat(list(held)).float().mean().item()


def by_suite(model: LoadedModel, cell: Cell, asked: Asked) -> tuple[str, float | None]:
    """Answer of a cell, as a run has it."""
    (found,) = Engine(model.model, model.tokenizer, [cell]).answer(asked.document, [cell])
    if isinstance(found, Failure):
        raise UserError(f"{cell.label}: {found.error}")
    assert isinstance(found.answer, Generated)
    if not cell.impl.knows_states:
        return found.answer.text, None
    cache, _ = cell.prefill(model.model, torch.tensor([asked.ids]))
    states = cell.states(cache)
    assert states is not None
    return found.answer.text, share([(codes[:, asked.number] != EVICTED).all(dim=-1) for codes in states.values()])


def by_pipeline(
    model: LoadedModel, asked: Asked, ratio: float, parts: tuple[str, str] | None, **settings: Any
) -> tuple[str, float | None]:
    """Answer of kvpress' own pipeline.

    Args:
        parts: context and question as texts, to which the pipeline adds the chat template; None is the suite's tokens.
    """
    kvpress = library(SNAPKV)
    pipeline = kvpress.KVPressTextGenerationPipeline(model=model.model, tokenizer=model.tokenizer)
    press = recording(kvpress.SnapKVPress, compression_ratio=ratio, **settings)
    with torch.inference_mode():
        if parts is None:
            inputs = {"context_ids": torch.tensor([asked.ids[:-1]]), "questions_ids": [torch.tensor([asked.ids[-1:]])]}
            (answer,) = pipeline._forward(inputs, max_new_tokens=asked.new_tokens, press=press)
            places = torch.tensor(asked.number)
            held = [torch.stack([torch.isin(places, head).all() for head in kept]) for kept in press.kept]
            return answer, share(held)
        context, question = parts
        said = "The special magic number mentioned in the text is"
        answer = pipeline(context, question=question, answer_prefix=said, press=press, max_new_tokens=asked.new_tokens)[
            "answer"
        ]
    return answer, None


def texts(model: LoadedModel, asked: Asked) -> tuple[str, str]:
    """The user's words: what stands before the question, and the question."""
    text = model.tokenizer.decode(asked.ids)
    start = text.index("There is a special magic number")
    end = text.index("What is the special magic number")
    return text[start:end], re.split(r"<\|", text[end:], maxsplit=1)[0]


def measure(model: LoadedModel, documents: Sequence[Document], ratio: float) -> list[dict[str, Any]]:
    """A row for each prompt and variant."""
    cells = grid(("origin", SNAPKV), [{"cache_ratio": ratio}], [32], None, {"budget_unit": "bytes"})
    task = NeedleTask()
    rows = []
    for document in documents:
        asked = Asked(model, document)
        context, question = texts(model, asked)
        variants: dict[str, Callable[[], tuple[str, float | None]]] = {
            f"suite: {cell.method}": partial(by_suite, model, cell, asked) for cell in cells
        }
        pipeline = partial(by_pipeline, model, asked, 1 - ratio)
        variants |= {f"pipeline: {name}": partial(pipeline, None, **changed) for name, changed in VARIANTS.items()}
        variants["pipeline: question behind"] = partial(pipeline, (context, question))
        for name, find in variants.items():
            answer, heads = find()
            right = task.score(document, Generated(text=answer))["exact_match"]
            known = {"document": document.id, "number": document.reference, "answer": answer}
            rows.append({"variant": name, **known, "right": right, "heads_with_number": heads})
            print(document.id, name, right, None if heads is None else round(heads, 3), repr(answer), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        model = load(options.model)
        settings = TaskSettings(
            tokenizer=model.tokenizer,
            max_length=model.context_length or options.length + 64,
            options={"lengths": (options.length,), "samples": options.samples},
        )
        rows = measure(model, NeedleTask().load(settings), options.cache_ratio)
    except (UserError, ValueError) as error:
        raise SystemExit(f"snapkv.py: {error}") from None
    options.outdir.mkdir(parents=True, exist_ok=True)
    write_atomic(options.outdir / "snapkv.csv", csv_text(COLUMNS, rows))
    record = {
        "settings": {**vars(options), "outdir": options.outdir.name},
        "finished": records.now(),
        "model": {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype, "device": model.device},
        **records.environment(),
    }
    write_atomic(options.outdir / "record.json", json_text(record))


if __name__ == "__main__":
    main()
