"""Agreement with the official generators: figures over 200 prompts of each, beside ours.

``official.json`` is of 200 prompts of each task that the scripts of github.com/NVIDIA/RULER at c3f5e3b have made, of
4,096 tokens with seed 42 and the default model's tokenizer: the least and the largest size, and, of the ``prompts``
whose size most have, mean and standard deviation of every figure.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.ruler.definitions import DEFINITIONS, OFFLINE
from tasks.ruler.options import RulerOptions
from tasks.ruler.task import Source
from tests.tasks.ruler.test_prompts import ask, documents, text_of

OFFICIAL = json.loads((Path(__file__).parent / "official.json").read_text())
LENGTH, SAMPLES, SEED = 4096, 200, 42

Figures = dict[str, float]


def _niah(text: str, references: Sequence[str]) -> Figures:
    lines = text.split("\n")[1:-1]
    (place,) = (n for n, line in enumerate(lines) if references[0] in line)
    return {
        "lines": len(lines),
        "place of the needle": place / len(lines),
        "letters of a line": len(lines[place]),
        "letters of the others": statistics.fmean(len(line) for n, line in enumerate(lines) if n != place),
        "letters of the question": len(text.rsplit("\n", 1)[1]),
    }


def _vt(text: str, references: Sequence[str]) -> Figures:
    example, _, task = text.partition("\n\nMemorize")
    figures = {"letters of the example": float(len(example))}
    for name, part in (("example", example), ("text", task)):
        lines = part.split("\n")
        places = [n for n, line in enumerate(lines) if line.startswith("VAR ")]
        figures[f"lines of the {name}"] = len(lines)
        figures[f"assignments of the {name}"] = len(places)
        if part is task:
            figures |= {f"place of assignment {n}": place / len(lines) for n, place in enumerate(places)}
            figures["value"] = int(lines[places[0]].split()[-1])
    return figures


def _cwe(text: str, references: Sequence[str]) -> Figures:
    figures = {}
    for name, part in (("example", text.split("\n")[1]), ("text", text.split("\n")[-2])):
        words = [word for word in re.split(r" ?\d+\. ", part) if word]
        counts = Counter(words)
        figures[f"words of the {name}"] = len(words)
        figures[f"different words of the {name}"] = len(counts)
        if name == "text":
            figures["letters of a word"] = statistics.fmean(map(len, counts))
            figures["repetitions"] = statistics.fmean(counts[word] for word in references)
            figures["place of common words"] = statistics.fmean(n for n, word in enumerate(words) if word in references)
    return figures


def _fwe(text: str, references: Sequence[str]) -> Figures:
    words = text.partition("coded words. ")[2].partition("\nQuestion:")[0].split(" ")
    counts = Counter(words)
    figures: Figures = {"words": len(words), "different words": len(counts), "dots": counts["..."]}
    for rank, word in enumerate(references, start=2):
        figures[f"word of rank {rank}"] = counts[word]
        figures[f"place of rank {rank}"] = statistics.fmean(n for n, other in enumerate(words) if other == word)
    return figures


FIGURES: Mapping[str, Callable[[str, Sequence[str]], Figures]] = {
    "niah_single_1": _niah, "niah_multikey_2": _niah, "niah_multikey_3": _niah, "vt": _vt, "cwe": _cwe, "fwe": _fwe,
}  # fmt: skip


def summary(rows: Sequence[Figures]) -> dict[str, list[float]]:
    """Mean and standard deviation of each figure."""
    return {
        name: [statistics.fmean(r[name] for r in rows), statistics.pstdev(r[name] for r in rows)] for name in rows[0]
    }


SIZES = {
    "niah_single_1": "lines",
    "niah_multikey_2": "lines",
    "niah_multikey_3": "lines",
    "vt": "lines of the text",
    "cwe": "different words of the text",
    "fwe": "words",
}
"""The figure that a prompt's size can be told by."""


@pytest.fixture(scope="module")
def own_tokenizer() -> Any:
    """The default model's, without its chat template."""
    from bench.models.loading import describe

    tokenizer = describe("smollm2-135m").tokenizer
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("part", OFFLINE)
def test_prompts_are_the_official_ones_by_their_figures(part: str, own_tokenizer: Any) -> None:
    """At the size that most official prompts have, every mean is within four standard errors, and our own sizes are
    within one step of the official ones."""
    begin = time.process_time()
    made = documents(part, own_tokenizer, options={"lengths": [LENGTH], "samples": SAMPLES}, seed=SEED)
    per_document = (time.process_time() - begin) / SAMPLES
    form, theirs = DEFINITIONS[part], OFFICIAL[part]

    settings = ask(own_tokenizer, seed=SEED, options={"lengths": [LENGTH]})
    source = Source(form, RulerOptions.parse("ruler", settings.options), settings)
    maker = source.maker(LENGTH)

    def figures(size: int, index: int) -> Figures:
        text = maker.make(size, random.Random(f"official {index}"), index)
        tokens = source.prompts.tokens(text) + form.max_new_tokens
        return {"tokens": tokens, **FIGURES[part](text.whole, text.references)}

    size = next(n for n in range(maker.least, 2000) if figures(n, 0)[SIZES[part]] == theirs["figures"][SIZES[part]][0])
    # The official ones of this size are those that fit.
    rows = [row for index in range(2 * SAMPLES) if (row := figures(size, index))["tokens"] <= LENGTH][:SAMPLES]
    assert len(rows) > SAMPLES / 4
    ours = summary(rows)
    assert ours.keys() == theirs["figures"].keys()
    for name, (mean, deviation) in theirs["figures"].items():
        mine, my_deviation = ours[name]
        noise = 4 * math.sqrt(deviation**2 / theirs["prompts"] + my_deviation**2 / len(rows))
        assert abs(mine - mean) <= noise + 1e-3 * abs(mean), f"{name}: {mine} beside the official {mean}"
        assert my_deviation <= 1.25 * deviation + 1e-3 * abs(mean), f"{name}: spread {my_deviation} beside {deviation}"

    found = [FIGURES[part](text_of(own_tokenizer, d), d.reference)[SIZES[part]] for d in made]
    step = figures(size + maker.step, 0)[SIZES[part]] - figures(size, 0)[SIZES[part]]
    low, high = theirs["sizes"]
    assert low - step <= min(found) <= max(found) <= high + step
    assert per_document < 0.1
