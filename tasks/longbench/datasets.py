"""The 21 datasets of LongBench, and the 13 of them that make LongBench-E, with what the official tables say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset as the official code treats it."""

    name: str
    title: str
    """As published tables write it."""
    metric: str
    """A key of :data:`tasks.longbench.metrics.METRICS`."""
    category: str
    language: str
    """English, Chinese or Code."""
    extended: bool
    """Part of LongBench-E too."""

    @property
    def first_line_only(self) -> bool:
        """Only the first line of a prediction is scored: models go on with further examples of their own."""
        return self.category == FEW_SHOT

    @property
    def uses_chat_template(self) -> bool:
        """Examples and code are continued, not answered: the official code leaves their prompts as they are."""
        return self.category not in (FEW_SHOT, CODE)


SINGLE_DOC, MULTI_DOC, SUMMARIZATION = "Single-doc QA", "Multi-doc QA", "Summarization"
FEW_SHOT, SYNTHETIC, CODE = "Few-shot", "Synthetic", "Code"

CATEGORIES = (SINGLE_DOC, MULTI_DOC, SUMMARIZATION, FEW_SHOT, SYNTHETIC, CODE)
LANGUAGES = ("English", "Chinese", "Code")

_TABLE = """
narrativeqa          | NarrativeQA         | qa_f1          | Single-doc QA | English |
qasper               | Qasper              | qa_f1          | Single-doc QA | English | E
multifieldqa_en      | MultiFieldQA-en     | qa_f1          | Single-doc QA | English | E
multifieldqa_zh      | MultiFieldQA-zh     | qa_f1_zh       | Single-doc QA | Chinese |
hotpotqa             | HotpotQA            | qa_f1          | Multi-doc QA  | English | E
2wikimqa             | 2WikiMultihopQA     | qa_f1          | Multi-doc QA  | English | E
musique              | MuSiQue             | qa_f1          | Multi-doc QA  | English |
dureader             | DuReader            | rouge_zh       | Multi-doc QA  | Chinese |
gov_report           | GovReport           | rouge          | Summarization | English | E
qmsum                | QMSum               | rouge          | Summarization | English |
multi_news           | MultiNews           | rouge          | Summarization | English | E
vcsum                | VCSUM               | rouge_zh       | Summarization | Chinese |
trec                 | TREC                | classification | Few-shot      | English | E
triviaqa             | TriviaQA            | qa_f1          | Few-shot      | English | E
samsum               | SAMSum              | rouge          | Few-shot      | English | E
lsht                 | LSHT                | classification | Few-shot      | Chinese |
passage_count        | PassageCount        | count          | Synthetic     | English | E
passage_retrieval_en | PassageRetrieval-en | retrieval      | Synthetic     | English | E
passage_retrieval_zh | PassageRetrieval-zh | retrieval_zh   | Synthetic     | Chinese |
lcc                  | LCC                 | code_sim       | Code          | Code    | E
repobench-p          | RepoBench-P         | code_sim       | Code          | Code    | E
"""


def _parse(line: str) -> Dataset:
    name, title, metric, category, language, extended = (cell.strip() for cell in line.split("|"))
    return Dataset(name=name, title=title, metric=metric, category=category, language=language, extended=bool(extended))


DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in map(_parse, _TABLE.strip().splitlines())}
"""By name, in the official order."""

EXTENDED: tuple[str, ...] = tuple(name for name, dataset in DATASETS.items() if dataset.extended)
"""Names of the datasets of LongBench-E."""

BUCKETS = ("0-4k", "4-8k", "8k+")
"""Score buckets of LongBench-E."""


def bucket(length: int) -> str:
    """The bucket of a row by its ``length``: words, or characters of a Chinese text."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]
