"""Tokenizers whose tokens are the bytes of a text, and small data sets of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bytes_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and no special tokens."""
    vocabulary = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return bytes_tokenizer(CHAT)


def squad() -> dict[str, Any]:
    """Two articles of six paragraphs; each has a question with an answer and one without."""

    def paragraph(article: int, number: int) -> dict[str, Any]:
        shade = f"shade-{article}{number}"
        text = f"In article {article} the paragraph {number} says that the colour of house {number} is {shade}."
        asked = {
            "question": f"Which colour has house {number} of article {article}?",
            "answers": [{"text": f"shade-{article}{number}"}, {"text": f"SHADE {article}{number}"}],
            "is_impossible": False,
        }
        return {"context": text, "qas": [{"question": "Who?", "answers": [], "is_impossible": True}, asked]}

    return {"data": [{"title": f"t{a}", "paragraphs": [paragraph(a, number) for number in range(6)]} for a in range(2)]}


def hotpotqa() -> list[dict[str, Any]]:
    """Four questions with ten documents each."""
    return [
        {
            "question": f"Which of the two towns of pair {q} is older?",
            "answer": f"Town {q}-3",
            "context": [
                [f"Town {q}-{d}", [f"It was founded in {1200 + 10 * q + d}.", " It lies by a river."]]
                for d in range(10)
            ],
        }
        for q in range(4)
    ]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``--data-dir`` with both, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "dev-v2.0.json").write_text(json.dumps(squad()))
    (folder / "ruler").mkdir()
    (folder / "ruler" / "hotpotqa.json").write_text(json.dumps(hotpotqa()))
    return folder
