"""LongBench's metrics against a second reading of them, on their quirks, and on real rows with pinned scores."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.base import TaskError
from tasks.longbench import metrics
from tasks.longbench.datasets import DATASETS
from tasks.longbench.metrics import METRICS, score
from tests.tasks.longbench import reading
from tests.tasks.longbench.conftest import derived, real_rows

PAIRS = pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])

ENGLISH = [
    *["The", "a", "an", "cat,", "sat.", "on", "the", "MAT;", "it's", "1,000", "well-known", "U.S.", "naïve", "café"],
    *["—", "'quoted'", "(twice)", "...", "and?", "no", "Yes", "42"],
]
CHINESE = [
    "北京",
    "天安门",
    "我爱",
    "《红楼梦》",
    "，",
    "。",
    "“引文”",
    "2012年",
    "增长了",
    "25.89%",
    "ＡＢＣ",
    "的",
    "研究 会",
    "Hello",
]
CODE = [
    "def f(x):",
    "    return x",
    "# note",
    "// note",
    "```python",
    "x = 1",
    "",
    "   ",
    "if a == b:",
    "};",
    "\t",
    "print('ä')",
]
ODD = ["", " ", "\n", "\u3000", "\u2028", "...", ".", "🙂", "\x00", "e\u0301", "\ufeff", "a", "the"]
NUMBERS = ["3", "03", "30", "Paragraph 3", "段落3", "段落 3", "Paragraph 12", "12.5", "x3y", "no", "３", "and"]
CLASSES = [
    "Food",
    "Date",
    "Date of birth",
    "Order",
    "Order, rank",
    "rank",
    "Speed",
    "Individual",
    "In",
    "体育",
    "体育新闻",
]


def joined(rng: random.Random, words: list[str], glue: str, longest: int) -> str:
    return glue.join(rng.choice(words if rng.random() < 0.95 else ODD) for _ in range(rng.randint(0, longest)))


def changed(rng: random.Random, text: str, make: Callable[[], str]) -> str:
    """A prediction that has something of an answer, or nothing."""
    kind = rng.randrange(7)
    if kind == 0:
        return text
    if kind == 1:
        return text[: rng.randint(0, len(text))]
    if kind == 2:
        return "".join(rng.sample(text, len(text)))
    if kind == 3:
        return make() + text
    if kind == 4:
        return text + "\n" + make()
    if kind == 5:
        return "".join(character for character in text if rng.random() < 0.8)
    return make()


def pairs(metric: str, count: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(metric)
    sources = {
        "en": lambda: joined(rng, ENGLISH, " ", 14),
        "zh": lambda: joined(rng, CHINESE, "", 9),
        "code": lambda: joined(rng, CODE, "\n", 4),
        "numbers": lambda: joined(rng, NUMBERS, " ", 6),
    }
    home = {"qa_f1_zh": "zh", "rouge_zh": "zh", "code_sim": "code", "count": "numbers"}.get(metric, "en")
    for _ in range(count):
        make = sources[home if rng.random() < 0.6 else rng.choice(list(sources))]
        if metric in ("retrieval", "retrieval_zh"):
            answer = f"{'Paragraph ' if metric == 'retrieval' else '段落'}{rng.choice([3, 12, 30])}"
            make = sources["numbers"]
        elif metric == "count":
            answer = rng.choice(["3", "12", "30", "03"])
        else:
            answer = make()
        yield changed(rng, answer, make), answer


@PAIRS
@pytest.mark.parametrize("metric", reading.PLAIN)
def test_scores_equal_a_second_reading(metric: str, count: int) -> None:
    found = [(METRICS[metric](p, a, ()), reading.PLAIN[metric](p, a)) for p, a in pairs(metric, count)]
    assert len(found) == count
    assert max(abs(ours - theirs) for ours, theirs in found) <= 1e-9
    assert len({theirs for _, theirs in found}) >= 5, "the pairs are too alike"


@PAIRS
def test_classification_equals_a_second_reading(count: int) -> None:
    rng = random.Random("classification")
    seen = set()
    for _ in range(count):
        classes = rng.sample(CLASSES, rng.randint(1, len(CLASSES)))
        answer = rng.choice(classes if rng.random() < 0.9 else CLASSES)
        prediction = changed(rng, answer, lambda: joined(rng, CLASSES, " ", 5))
        expected = reading.classification(prediction, answer, classes)
        assert METRICS["classification"](prediction, answer, classes) == pytest.approx(expected, abs=1e-9)
        seen.add(expected)
    assert {0.0, 0.5, 1.0} <= seen


def test_every_dataset_has_a_metric() -> None:
    assert {dataset.metric for dataset in DATASETS.values()} == set(METRICS) == {*reading.PLAIN, "classification"}


# --- Quirks of the official code that change numbers ---


def test_texts_without_words_do_not_match() -> None:
    assert metrics.qa_f1("The", "a") == 0.0
    assert metrics.qa_f1_zh("。", "。") == 0.0


def test_punctuation_goes_before_articles() -> None:
    assert metrics.qa_f1("a.b", "ab") == 1.0
    assert metrics.qa_f1("U.S.A", "usa") == 1.0


def test_an_opening_book_title_mark_is_a_word() -> None:
    assert metrics.qa_f1_zh("《", "《") == 1.0
    assert metrics.qa_f1_zh("》", "》") == 0.0


def test_rouge_counts_a_word_once_and_knows_full_stops_only() -> None:
    assert metrics.rouge("no no no no", "no") == pytest.approx(1.0, abs=1e-8)
    assert metrics.rouge("b. a", "a. b") == pytest.approx(1.0, abs=1e-8)
    assert metrics.rouge("b! a", "a! b") < 0.7
    assert metrics.rouge("same", "same") == 2 / (2 + 1e-8), "never quite 1"
    assert metrics.rouge("...", "same") == 0.0


@pytest.mark.slow
def test_two_long_texts_without_full_stops_score_nothing() -> None:
    words = [f"w{i}" for i in range(1_000)]
    assert metrics.rouge(" ".join(words), " ".join(words)) == 0.0
    assert metrics.rouge(" ".join(words[:980]), " ".join(words[:980])) > 0.99


@pytest.mark.slow
def test_how_long_a_text_may_be_does_not_depend_on_the_caller() -> None:
    text = " ".join(f"v{i}" for i in range(980))

    def deep(frames: int) -> float:
        return deep(frames - 1) if frames else metrics.rouge(text, text)

    assert deep(200) > 0.99


def test_of_two_neighbouring_classes_within_the_answer_only_the_first_is_removed() -> None:
    classes = ["Order", "rank", "Order, rank"]
    assert metrics.classification("Order, rank", "Order, rank", classes) == 0.5
    assert metrics.classification("Order, rank", "Order, rank", ["Order", "Order, rank", "rank"]) == 1.0


def test_numbers_are_compared_as_text() -> None:
    assert metrics.count("05 and 5", "5") == 0.5
    assert metrics.count("5.5", "5") == 1.0
    assert metrics.retrieval("Paragraph 3 of 30", "Paragraph 3") == 0.5
    assert metrics.retrieval_zh("答案是段落3", "段落3") == 1.0


def test_code_takes_the_first_line_that_is_no_comment() -> None:
    assert metrics.code_sim("\n\n# a\n```\n  x = 1\ny", "  x = 1") == 1.0
    assert metrics.code_sim("   \nx = 1", "x = 1") == 0.5, "a line of blanks counts"
    assert metrics.code_sim("x = 1  # why\n", "x = 1") == 0.0
    assert metrics.code_sim("", "") == 1.0


def test_the_ratio_is_that_of_edits_in_whole_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    # difflib, which fuzzywuzzy falls back to, gives 33.
    assert metrics.code_sim("ababab", "aaaaab") == 0.67
    from fuzzywuzzy import fuzz

    monkeypatch.setattr(fuzz, "SequenceMatcher", __import__("difflib").SequenceMatcher)
    metrics._ratio.cache_clear()
    with pytest.raises(TaskError, match="python-Levenshtein"):
        metrics.code_sim("ababab", "aaaaab")


def test_a_row_gets_its_best_answer_and_its_first_line() -> None:
    assert score(DATASETS["triviaqa"], "\n\nfifty-five\nPassage: 55", ["55", "fifty-five"]) == 1.0
    assert score(DATASETS["qasper"], "fifty-five\n55", ["fiftyfive"]) == pytest.approx(2 / 3)
    assert score(DATASETS["qasper"], "anything", []) == 0.0
    assert score(DATASETS["trec"], "", ["Food"], ["Food", "Date"]) == 0.0


def test_an_answer_that_names_no_paragraph() -> None:
    with pytest.raises(TaskError, match="'Passage 3' names no paragraph"):
        metrics.retrieval("3", "Passage 3")


@pytest.mark.slow
def test_jieba_says_and_writes_nothing(tmp_path: Path) -> None:
    code = "from tasks.longbench.metrics import qa_f1_zh; print(qa_f1_zh('我爱北京天安门', '北京'))"
    environment = {
        "PYTHONPATH": str(Path.cwd()),
        "TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0.4\n", "")
    assert list(tmp_path.iterdir()) == []


def test_scoring_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    metrics.rouge("one thread", "one thread less")
    assert threading.active_count() == before


# --- Real rows ---

KINDS = ("exact", "truncated", "shuffled", "prefixed")
"""The first two rows of each dataset; predictions made from the first answer."""

PINNED: dict[str, tuple[float, ...]] = {
    "narrativeqa": (100.0, 70.8333333333, 100.0, 75.0),
    "qasper": (100.0, 74.6153846154, 100.0, 84.7222222222),
    "multifieldqa_en": (100.0, 70.8333333333, 100.0, 87.1212121212),
    "multifieldqa_zh": (100.0, 33.3333333333, 32.0, 69.4444444444),
    "hotpotqa": (100.0, 66.6666666667, 100.0, 66.6666666667),
    "2wikimqa": (100.0, 83.3333333333, 100.0, 58.3333333333),
    "musique": (100.0, 73.3333333333, 100.0, 82.9545454545),
    "dureader": (99.9999995, 74.1758237095, 19.0235076412, 97.7999164783),
    "gov_report": (99.9999995, 75.8601836488, 68.8348231788, 99.8450678584),
    "qmsum": (99.9999995, 73.6507931858, 59.5225459191, 97.2055132849),
    "multi_news": (99.9999995, 74.6790692997, 65.6389226207, 99.6563690205),
    "vcsum": (99.9999995, 71.5104315092, 7.6364932972, 99.2890672398),
    "trec": (100.0, 50.0, 100.0, 100.0),
    "triviaqa": (100.0, 83.3333333333, 100.0, 65.0),
    "samsum": (99.9999995, 69.6969692433, 58.9285709286, 85.1612898349),
    "lsht": (100.0, 0.0, 0.0, 100.0),
    "passage_count": (100.0, 100.0, 100.0, 100.0),
    "passage_retrieval_en": (100.0, 0.0, 100.0, 100.0),
    "passage_retrieval_zh": (100.0, 0.0, 50.0, 100.0),
    "lcc": (100.0, 33.5, 57.5, 83.5),
    "repobench-p": (100.0, 14.0, 92.5, 84.0),
}


LONG_ANSWERS = ("gov_report", "multi_news")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG_ANSWERS else name for name in DATASETS]
)
def test_real_rows_have_the_pinned_scores(name: str, shared_data: Path) -> None:
    dataset = DATASETS[name]
    rows = real_rows(shared_data, name)[:2]
    found = []
    for kind in KINDS:
        shares = [
            score(
                dataset,
                derived(row["answers"][0], kind, chinese=dataset.language == "Chinese"),
                row["answers"],
                row["all_classes"] or (),
            )
            for row in rows
        ]
        found.append(100 * sum(shares) / len(shares))
    assert found == pytest.approx(PINNED[name], abs=1e-9)
