"""A second reading of LongBench's metrics: written from their definitions, on the libraries' behaviour but not on ours.

ROUGE-L and the ratio of edits are computed here from scratch; only jieba's segmentation is taken as it is.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import jieba

_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗"
    "〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def overlap_f1(left: Sequence[str], right: Sequence[str]) -> float:
    count_left, count_right = Counter(left), Counter(right)
    same = sum(min(count, count_right[word]) for word, count in count_left.items())
    if not same:
        return 0.0
    p, r = same / len(left), same / len(right)
    return 2 * p * r / (p + r)


def qa_f1(prediction: str, answer: str) -> float:
    def words(text: str) -> list[str]:
        text = text.lower().translate({ord(mark): None for mark in string.punctuation})
        return [word for word in re.sub(r"\b(?:a|an|the)\b", " ", text).split() if word]

    return overlap_f1(words(prediction), words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    dropped = {ord(mark): None for mark in string.punctuation + _CHINESE}

    def words(text: str) -> list[str]:
        cut = [re.sub(r"\s", "", word.lower().translate(dropped)) for word in jieba.lcut(text)]
        return [word for word in cut if word]

    return overlap_f1(words(prediction), words(answer))


def common_subsequence(reference: list[str], candidate: list[str]) -> list[str]:
    """One longest common subsequence; of several, the one that the walk back from the ends meets first."""
    n, m = len(reference), len(candidate)
    best = [[0] * (m + 1) for _ in range(n + 1)]
    for i, word in enumerate(reference):
        for j, other in enumerate(candidate):
            best[i + 1][j + 1] = best[i][j] + 1 if word == other else max(best[i][j + 1], best[i + 1][j])
    found = []
    i, j = n, m
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            found.append(reference[i - 1])
            i, j = i - 1, j - 1
        elif best[i - 1][j] > best[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge(prediction: str, answer: str) -> float:
    """Summary-level ROUGE-L: sentences end at full stops, words are counted once, matches are pooled over sentences."""

    def sentences(text: str) -> list[list[str]]:
        return [" ".join(part.split()).split(" ") for part in text.split(".") if part]

    candidate, reference = sentences(prediction), sentences(answer)
    if not candidate or not reference:
        return 0.0
    matched = {word for r in reference for c in candidate for word in common_subsequence(r, c)}
    p = len(matched) / len({word for sentence in candidate for word in sentence})
    r = len(matched) / len({word for sentence in reference for word in sentence})
    return 2.0 * (p * r / (p + r + 1e-8))


def rouge_zh(prediction: str, answer: str) -> float:
    return rouge(" ".join(jieba.lcut(prediction)), " ".join(jieba.lcut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Classes within the answer's name are taken out while the list is walked: the one behind each is passed over."""
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            first = named.index(named[place])
            del named[first]
        place += 1
    return 1 / len(named) if answer in named else 0.0


def numbers(prediction: str, wanted: str) -> float:
    """Digits of any script make a number, and none of another script is equal to one of ours."""
    found = re.findall(r"\d+", prediction)
    return sum(number == wanted for number in found) / len(found) if found else 0.0


def retrieval(prediction: str, answer: str) -> float:
    return numbers(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction: str, answer: str) -> float:
    return numbers(prediction, re.findall(r"段落(\d+)", answer)[0])


def code_sim(prediction: str, answer: str) -> float:
    """Whole percent of 2 x longest common subsequence / both lengths, of the first line without comment or fence."""
    while prediction.startswith("\n"):
        prediction = prediction[1:]
    line = ""
    for candidate in prediction.split("\n"):
        if "`" in candidate or "#" in candidate or "//" in candidate:
            continue
        line = candidate
        break
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    common = len(common_subsequence(list(line), list(answer)))
    return round(100 * (2 * common / (len(line) + len(answer)))) / 100


PLAIN: dict[str, Callable[[str, str], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": numbers,
    "code_sim": code_sim,
}
"""By the metrics' names; classification takes its classes too."""
