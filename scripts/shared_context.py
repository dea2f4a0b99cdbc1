#!/usr/bin/env python
"""Time of several questions to one context, which is prefilled and compressed once, beside that of as many documents by
themselves.

    python scripts/shared_context.py --questions 4 --length 2048 --batch-size 4

Both are answered in turn, so that whatever else the machine does falls on both; each ratio is of one such pair. Beside
the ratio of seconds stands that of the seconds that the processor was at work, which other programs change less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch

from bench.engine.engine import Engine, Failure
from bench.methods.grid import Cell, grid
from bench.models.loading import load
from tasks.base import Document, Generate


def questions(count: int, length: int, new: int, vocabulary: int) -> list[Document]:
    """Documents with one context of random tokens, each with a question of its own."""
    draws = torch.Generator().manual_seed(0)
    ids = [torch.randint(100, vocabulary, (size,), generator=draws).tolist() for size in (length, *[24] * count)]
    return [
        Document(
            id=str(number),
            request=Generate(prompt_ids=tuple(ids[0]), question_ids=tuple(question), max_new_tokens=new),
        )
        for number, question in enumerate(ids[1:])
    ]


def seconds(engine: Engine, batches: Sequence[Sequence[Document]], cells: Sequence[Cell]) -> tuple[float, float]:
    """What it takes to answer the batches, one after the other: in all, and of the processor."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        for _, outcome in engine.answer_batch([(document, cells) for document in batch]):
            if isinstance(outcome, Failure):
                raise SystemExit(outcome.error)
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="full,mix")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the context")
    parser.add_argument("--new", type=int, default=8, help="tokens of an answer, at most")
    parser.add_argument("--batch-size", type=int, help="questions side by side; without, as many as take a gibibyte")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    loaded = load(given.model, dtype="auto", device="auto", trust_remote_code=False)
    cells = grid(given.methods.split(","), [{"cache_ratio": 0.25}], [], None, {})
    engine = Engine(loaded.model, loaded.tokenizer, cells, batch_size=given.batch_size)
    documents = questions(given.questions, given.length, given.new, loaded.model.config.vocab_size)
    engine.warm_up()
    pairs = []
    for _ in range(given.pairs):
        together = seconds(engine, [documents], cells)
        apart = seconds(engine, [[document] for document in documents], cells)
        pairs.append([one / four for one, four in zip(together, apart, strict=True)])
        said = ", ".join("{:.2f} s ({:.2f} s of the processor)".format(*each) for each in (together, apart))
        print(f"together and apart {said}: ratio {pairs[-1][0]:.3f} ({pairs[-1][1]:.3f})", flush=True)
    for name, ratios in zip(("all seconds", "the processor's"), zip(*pairs, strict=True), strict=True):
        print(f"median ratio of {name} {median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
