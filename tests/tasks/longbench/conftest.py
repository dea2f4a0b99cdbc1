"""Real rows, predictions made from their answers, and a jieba that leaves nothing behind."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _jieba_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests' own use of jieba, beside the product's."""
    import jieba

    jieba.setLogLevel(logging.ERROR)
    jieba.dt.tmp_dir = str(tmp_path_factory.mktemp("jieba"))


def real_rows(shared_data: Path, name: str) -> list[dict[str, Any]]:
    lines = (shared_data / "minilongbench" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def derived(answer: str, kind: str, *, chinese: bool) -> str:
    """A prediction made from an answer: exact, truncated, shuffled or prefixed."""
    glue = "" if chinese else " "
    pieces = list(answer) if chinese else answer.split(" ")
    if kind == "truncated":
        pieces = pieces[: (len(pieces) + 1) // 2]
    elif kind == "shuffled":
        random.Random(len(answer)).shuffle(pieces)
    elif kind == "prefixed":
        pieces = ["\n", "The", "answer", "is", *pieces]
    return glue.join(pieces)
