"""Agreement with the official generators: figures over 200 prompts of each, beside ours.

``official.json`` is of 200 prompts of each task that the scripts of github.com/NVIDIA/RULER at c3f5e3b have made, of
4,096 tokens with seed 42 and the default model's tokenizer: the least and the largest size, and, of the ``prompts``
whose size most have, mean and standard deviation of every figure. They were given the essay and the questions that are
made here, and nltk's sentence splitter without its model, which that essay does not need.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tasks.ruler.definitions import DEFINITIONS
from tasks.ruler.options import RulerOptions
from tasks.ruler.task import Source
from tasks.text import made_sentences
from tests.tasks.ruler.test_prompts import ask, documents, text_of

OFFICIAL = json.loads((Path(__file__).parent / "official.json").read_text())
LENGTH, SAMPLES, SEED = 4096, 200, 42

Figures = dict[str, float]


def made_essay() -> str:
    """About 8,000 words, two prompts' worth."""
    sentences = made_sentences(random.Random("essay"))
    return " ".join(next(sentences) for _ in range(500))


def _passages(rng: random.Random) -> Callable[[], str]:
    sentences = made_sentences(rng)
    return lambda: " ".join(next(sentences) for _ in range(rng.randint(4, 10)))


def made_squad() -> dict[str, Any]:
    """220 questions that have an answer and as many that have none, of articles with 6 to 50 paragraphs: prompts hold
    a part of an article, or a whole one and others' paragraphs."""
    rng = random.Random("squad")
    passage, articles, asked = _passages(rng), [], 0
    while asked < 220:
        paragraphs = []
        for _ in range(rng.choice((6, 12, 50))):
            asked += 1
            question = {"question": f"What is the name of house {asked}?", "answers": [{"text": f"Villa {asked}"}]}
            paragraphs.append({
                "context": f"{passage()} The name of house {asked} is Villa {asked}.",
                "qas": [
                    {"question": "Who was it?", "answers": [], "is_impossible": True},
                    {**question, "is_impossible": False},
                ],
            })  # fmt: skip
        articles.append({"title": f"Article {len(articles)}", "paragraphs": paragraphs})
    return {"data": articles}


def made_hotpotqa() -> list[dict[str, Any]]:
    """220 questions with ten documents each."""
    passage, rows = _passages(random.Random("hotpotqa")), []
    for number in range(220):
        texts = [[f"Place {number}-{place}", [passage(), ""]] for place in range(10)]
        texts[3][1][1] = f" The name of house {number} is Villa {number}."
        rows.append({
            "question": f"What is the name of house {number}?", "answer": f"Villa {number}", "context": texts
        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the essay and the questions, as the official scripts read them."""
    folder = tmp_path_factory.mktemp("official")
    files = {"PaulGrahamEssays": {"text": made_essay()}, "squad": made_squad(), "hotpotqa": made_hotpotqa()}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


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


def _essay(text: str, references: Sequence[str]) -> Figures:
    """Words are those of the essay; places are words before a needle."""
    head, _, rest = text.partition("\n")
    essay, _, question = rest.partition("\n")
    pieces = re.split(r" ?One of the special magic (?:numbers|uuids) for (.+?) is: (\S+)\. ?", essay)
    words = [len(piece.split()) for piece in pieces[::3]]
    values = pieces[2::3]
    sentences = [piece.rstrip().endswith(".") for piece in pieces[:-1:3] if piece.strip()]
    figures: Figures = {
        "words": sum(words),
        "needles": len(values),
        "keys": len(set(pieces[1::3])),
        "letters of the head": len(head),
        "letters of the question": len(question),
        "letters of a key": statistics.fmean(map(len, pieces[1::3])),
        "needles at the end of a sentence": statistics.fmean(sentences or [True]),
        "references": len(references),
    }
    figures |= {f"place of needle {n}": sum(words[: n + 1]) for n in range(len(values))}
    return figures | {f"needle of reference {n}": values.index(value) for n, value in enumerate(references)}


def _qa(text: str, references: Sequence[str]) -> Figures:
    """Related documents are those of the same article (of qa_1), or of the same question (of qa_2)."""
    shown = re.split(r"\n*Document \d+:\n", text.rpartition("\n\nAnswer the question")[0])[1:]
    (gold,) = (n for n, document in enumerate(shown) if f" is {references[0]}." in document)
    return {
        "documents": len(shown),
        "different documents": len(set(shown)),
        "place of the answer": gold,
        "related documents": sum(document in RELATED[shown[gold]] for document in shown),
        "letters of a document": statistics.fmean(map(len, shown)),
        "letters of the question": len(text.rpartition("\n\nAnswer the question")[2]),
        "references": len(references),
    }


def _related() -> dict[str, set[str]]:
    """Every document with those that come with it."""
    groups = [{paragraph["context"] for paragraph in article["paragraphs"]} for article in made_squad()["data"]]
    groups += [{f"{title}\n{''.join(lines)}" for title, lines in row["context"]} for row in made_hotpotqa()]
    return {document: group for group in groups for document in group}


RELATED = _related()


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
    "niah_single_2": _essay, "niah_single_3": _essay, "niah_multikey_1": _essay, "niah_multivalue": _essay,
    "niah_multiquery": _essay, "qa_1": _qa, "qa_2": _qa,
}  # fmt: skip


def summary(rows: Sequence[Figures]) -> dict[str, list[float]]:
    """Mean and standard deviation of each figure."""
    return {
        name: [statistics.fmean(r[name] for r in rows), statistics.pstdev(r[name] for r in rows)] for name in rows[0]
    }


SIZES = {
    _niah: "lines",
    _essay: "words",
    _vt: "lines of the text",
    _cwe: "different words of the text",
    _fwe: "words",
    _qa: "documents",
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
@pytest.mark.parametrize("part", DEFINITIONS)
def test_prompts_are_the_official_ones_by_their_figures(part: str, own_tokenizer: Any, texts: Path) -> None:
    """At the size that most official prompts have, every mean is within four standard errors, and our own sizes are
    within one step of the official ones."""
    options = {"lengths": [LENGTH], "samples": SAMPLES, "haystack": texts / "PaulGrahamEssays.json"}
    begin = time.process_time()
    made = documents(part, own_tokenizer, options=options, seed=SEED, data_dir=texts)
    per_document = (time.process_time() - begin) / SAMPLES
    form, theirs, sized_by = DEFINITIONS[part], OFFICIAL[part], SIZES[FIGURES[part]]

    settings = ask(own_tokenizer, seed=SEED, options=options, data_dir=texts)
    source = Source(form, RulerOptions.parse("ruler", settings.options), settings)
    maker = source.maker(LENGTH)

    def figures(size: int, index: int, draw: str = "official") -> Figures:
        text = maker.make(size, random.Random(f"{draw} {index}"), index)
        tokens = source.prompts.tokens(text) + form.max_new_tokens
        return {"tokens": tokens, **FIGURES[part](text.whole, text.references)}

    wanted = theirs["figures"][sized_by][0]
    sizes = range(2 * max(document.info["size"] for document in made))
    size = bisect_left(sizes, wanted, lo=maker.least, key=lambda size: figures(size, 0)[sized_by])
    assert figures(size, 0)[sized_by] == wanted
    # The official ones of this size are those that fit; of given texts, which are as long as they are, those of them
    # that did not fit at the size before, where there is one.
    given = form.kind == "qa"
    larger = size + maker.step if given and size < theirs["sizes"][1] else None
    fitting = (
        row
        for index in range(SAMPLES if given else 2 * SAMPLES)
        if (row := figures(size, index))["tokens"] <= LENGTH
        and (larger is None or figures(larger, index, "first try")["tokens"] > LENGTH)
    )
    rows = list(islice(fitting, SAMPLES))
    assert len(rows) > SAMPLES / 4
    ours = summary(rows)
    assert ours.keys() == theirs["figures"].keys()
    for name, (mean, deviation) in theirs["figures"].items():
        mine, my_deviation = ours[name]
        noise = 4 * math.sqrt(deviation**2 / theirs["prompts"] + my_deviation**2 / len(rows))
        assert abs(mine - mean) <= noise + 1e-3 * abs(mean), f"{name}: {mine} beside the official {mean}"
        assert my_deviation <= 1.25 * deviation + 1e-3 * abs(mean), f"{name}: spread {my_deviation} beside {deviation}"

    found = [FIGURES[part](text_of(own_tokenizer, d), d.reference)[sized_by] for d in made]
    step = figures(size + maker.step, 0)[sized_by] - figures(size, 0)[sized_by]
    low, high = theirs["sizes"]
    assert low - step <= min(found) <= max(found) <= high + step
    assert per_document < 0.1
