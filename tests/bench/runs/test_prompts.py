"""What a run keeps of prompts: once each, as text, whatever happens to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.errors import UserError
from bench.names import DOCUMENTS
from bench.records.document import Part, Prompt, Prompts, prompt_line
from bench.runs.folder import RunFolder
from bench.runs.prompts import prompt_of, token_texts
from tasks.base import Compare, Continuation, Document, Generate, LogLikelihood, Request, Rolling
from tests.bench.lines import sample


class Bytes:
    """A tokenizer with a token for each byte."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def one(document: str = "a", text: str = "ä") -> Prompt:
    return Prompt(model="m", task="t", document=document, prompt_sha256="", parts=(Part(role="context", text=text),))


def choice(text: str, context: str = "what?") -> Continuation:
    return Continuation(context_ids=ids(context), token_ids=ids(text))


@pytest.mark.parametrize(
    ("request_", "parts"),
    [
        (Generate(prompt_ids=ids("all"), max_new_tokens=1), [("context", "all")]),
        (
            Generate(prompt_ids=ids("text"), question_ids=ids("one?"), turns=(ids("two?"),), max_new_tokens=1),
            [("context", "text"), ("question", "one?"), ("question", "two?")],
        ),
        (
            LogLikelihood(continuations=(choice("yes"), choice("no"))),
            [("context", "what?"), ("continuation", "yes"), ("continuation", "no")],
        ),
        (
            LogLikelihood(continuations=(choice("end", "She"), choice("end", "He"))),
            [("context", "She"), ("continuation", "end"), ("context", "He"), ("continuation", "end")],
        ),
        (Rolling(windows=(choice("one"), choice("two"))), [("text", "one"), ("text", "two")]),
        (Compare(context_ids=ids("text"), continuation_ids=ids("ä!")), [("context", "text"), ("continuation", "ä!")]),
    ],
)
def test_a_prompt_is_its_parts_in_the_order_they_are_read(request_: Request, parts: list[tuple[str, str]]) -> None:
    found = prompt_of("m", "t", Document(id="a", request=request_), Bytes())
    assert [(part.role, part.text) for part in found.parts] == parts
    assert [part.tokens for part in found.parts if part.tokens] == ([("", "ä", "!")] if "ä!" in parts[-1] else [])


@pytest.mark.parametrize("text", ["", "plain", "äö", "a\U0001f600b"])
def test_texts_of_tokens_are_the_text(text: str) -> None:
    found = token_texts(Bytes(), ids(text))
    assert "".join(found) == text
    assert len(found) == len(ids(text))
    # A character that was not finished stays what it is.
    assert "".join(token_texts(Bytes(), ids("aä")[:-1])) == "a\ufffd"


def test_a_prompt_is_kept_once_and_survives(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path, {}) as folder:
            folder.append(sample("a"))
            folder.keep(one())
            folder.keep(one())
    file = tmp_path / DOCUMENTS
    assert file.read_text() == f"{prompt_line(one())}\n"
    assert Prompts(file)[one().key] == one()
    # Half a line of a run that was killed is written again.
    file.write_bytes(file.read_bytes()[:-5])
    with RunFolder(tmp_path, {}) as folder:
        folder.keep(one())
        folder.keep(one("b", "other"))
        assert folder.prompts[one("b").key].parts[0].text == "other"
    assert [json_key[2] for json_key in Prompts(file)] == ["a", "b"]
    with RunFolder(tmp_path, {}, fresh=True):
        assert not file.exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / DOCUMENTS
    assert len(Prompts(file)) == 0
    file.write_text('{"model": "m"}\n')
    with pytest.raises(UserError, match=r"documents\.jsonl, line 1, field 'task': missing; remove the file"):
        len(Prompts(file))
