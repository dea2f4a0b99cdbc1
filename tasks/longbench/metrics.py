"""LongBench's metrics, equal to the official ones to the last digit, quirks included.

Each takes a prediction and one answer and gives a score in [0, 1]; :func:`score` is what a row gets. They lean on the
same libraries as the official code, in the versions of constraints.txt: rouge, jieba and fuzzywuzzy. The last one
computes another ratio when python-Levenshtein is missing (difflib's in the place of the edit distance's). The official
requirements do not name python-Levenshtein and the authors do not say what they had; here it is required, since the
measure is published as an edit similarity, and a missing one is an error rather than other numbers.
"""

from __future__ import annotations

import functools
import re
import string
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.base import TaskError
from tasks.longbench.datasets import Dataset

Metric = Callable[[str, str, Sequence[str]], float]
"""Score of a prediction for one answer; the third argument holds the classes of a classification."""

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""The official list. It has 》 and not 《, which therefore counts as a token of its own."""

_PUNCTUATION = frozenset(string.punctuation)
_ALL_PUNCTUATION = _PUNCTUATION | frozenset(_CHINESE_PUNCTUATION)


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return (2 * precision * recall) / (precision + recall)


def _without(text: str, characters: frozenset[str]) -> str:
    return "".join(character for character in text if character not in characters)


def _english_words(text: str) -> list[str]:
    """SQuAD's normalisation. Punctuation goes first: ``a.b`` is the word ``ab``, without an article."""
    return re.sub(r"\b(a|an|the)\b", " ", _without(text.lower(), _PUNCTUATION)).split()


def qa_f1(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """F1 over words, as SQuAD has it. Two texts without words score 0, where SQuAD's own script gives 1."""
    return _f1(_english_words(prediction), _english_words(answer))


@functools.cache
def _segmenter() -> Any:
    """jieba's tokenizer with its own dictionary.

    Left to itself jieba logs to stderr and keeps a pickle-like cache in the system's shared temporary folder: the
    dictionary is built here instead, in a second, and nothing is written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and pkg_resources, on newer Pythons
        import jieba
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def _chinese_words(text: str) -> list[str]:
    return list(_segmenter().cut(text, cut_all=False))


def qa_f1_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """F1 over jieba's words. Words are normalised after the cut, which still sees punctuation and upper case."""

    def words(text: str) -> list[str]:
        normal = ("".join(_without(word.lower(), _ALL_PUNCTUATION).split()) for word in _chinese_words(text))
        return [word for word in normal if word]

    return _f1(words(prediction), words(answer))


def rouge(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """F of the rouge package's summary-level ROUGE-L: sentences end at full stops, and a repeated word counts once.

    The official code scores 0 whatever goes wrong within the package. That is the case for a text without a sentence,
    and for two long texts without full stops, such as Chinese ones: the package walks the longest common subsequence by
    recursion, and at about a thousand words Python's limit ends it.
    """
    return _rouge_l(prediction, answer)


# Long texts take tenths of a second, and a run asks for each score more than once.
@functools.lru_cache(maxsize=16_384)
def _rouge_l(prediction: str, answer: str) -> float:
    result = 0.0

    def measure() -> None:
        nonlocal result
        from rouge import Rouge

        try:
            result = Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
        except (ValueError, RecursionError):
            result = 0.0

    # On a stack of its own, as deep as in the official script: how long a text may be must not depend on the caller.
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    return result


def rouge_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """:func:`rouge` over jieba's words."""
    return rouge(" ".join(_chinese_words(prediction)), " ".join(_chinese_words(answer)))


def classification(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that the prediction names, if the answer is one of them.

    A class that is part of the answer's name does not count. The official loop removes such classes from the list that
    it walks, and so skips the one behind each removed one: of two neighbours only the first goes.
    """
    named = [name for name in all_classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def _share_of_numbers(prediction: str, number: str) -> float:
    """Share of the prediction's numbers that are ``number``, compared as text: 05 is not 5."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _paragraph(answer: str, pattern: str) -> str:
    found = re.search(pattern, answer)
    if found is None:
        raise TaskError(f"the answer {answer!r} names no paragraph")
    return found[1]


def retrieval(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the answer's paragraph. Raises :class:`TaskError`."""
    return _share_of_numbers(prediction, _paragraph(answer, r"Paragraph (\d+)"))


def retrieval_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """:func:`retrieval` for answers of the form 段落5."""
    return _share_of_numbers(prediction, _paragraph(answer, r"段落(\d+)"))


def count(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the answer."""
    return _share_of_numbers(prediction, answer)


@functools.cache
def _ratio() -> Callable[[str, str], int]:
    """fuzzywuzzy's ratio in percent, a whole number. Raises :class:`TaskError` without python-Levenshtein."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fuzzywuzzy's own advice on a missing python-Levenshtein
        from fuzzywuzzy import fuzz
    if fuzz.SequenceMatcher.__module__ == "difflib":
        raise TaskError("code_sim needs python-Levenshtein, without which it has other values: pip install it")
    ratio: Callable[[str, str], int] = fuzz.ratio
    return ratio


def code_sim(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Edit similarity, in whole percent, of the first line that is neither comment nor fence.

    Only newlines are dropped before: a first line of blanks is that line. Two equal texts are 1, empty ones too.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return _ratio()(line, answer) / 100


METRICS: Mapping[str, Metric] = {
    metric.__name__: metric
    for metric in (qa_f1, qa_f1_zh, rouge, rouge_zh, classification, retrieval, retrieval_zh, count, code_sim)
}

BINARY = frozenset({"classification", "retrieval", "retrieval_zh", "count"})
"""Those that are 0 or 1 but for answers that name several classes or numbers, the right one among them."""


def score(dataset: Dataset, prediction: str, answers: Sequence[str], all_classes: Sequence[str] = ()) -> float:
    """What the official evaluation gives a row, in [0, 1]: the best over its answers, 0 where there is none."""
    if dataset.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = METRICS[dataset.metric]
    return max((metric(prediction, answer, all_classes) for answer in answers), default=0.0)


def check_row(dataset: Dataset, answers: Sequence[str], all_classes: Sequence[str]) -> None:
    """Raises :class:`TaskError` where a row's answers or classes are of no use to the dataset's metric."""
    if dataset.metric == "classification" and not all_classes:
        raise TaskError("the field 'all_classes' names no class")
    if dataset.metric in ("retrieval", "retrieval_zh"):
        for answer in answers:
            METRICS[dataset.metric]("", answer, ())
