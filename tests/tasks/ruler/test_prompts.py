"""The official words, the parts of a prompt, and what stands where in it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.base import Document, TaskSettings
from tasks.ruler.definitions import DEFINITIONS, OFFLINE
from tasks.ruler.makers import NOISE
from tasks.ruler.task import Ruler

NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w’'. -]+?) is: ([\w-]+)\.")


def ask(tokenizer: Any, **arguments: Any) -> TaskSettings:
    options = {"lengths": [9000], "samples": 6, **arguments.pop("options", {})}
    return TaskSettings(tokenizer=tokenizer, options=options, **{"max_length": 100_000, **arguments})


def documents(part: str, tokenizer: Any, **arguments: Any) -> list[Document]:
    (task,) = Ruler((part,)).members
    return list(task.load(ask(tokenizer, **arguments)))  # type: ignore[union-attr]


def text_of(tokenizer: Any, document: Document) -> str:
    return str(tokenizer.decode(list(document.request.input_ids)))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def essay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("essays") / "essay.txt"
    path.write_text(
        "\n".join(f"Mr. Hill thought of idea {n}, and why?  It was good! So was {n + 1}." for n in range(400))
    )
    return path


def made(part: str, tokenizer: Any, questions: Path, essay: Path, **arguments: Any) -> list[Document]:
    options = {"haystack": essay, **arguments.pop("options", {})}
    return documents(part, tokenizer, data_dir=questions, options=options, **arguments)


def test_the_words_are_the_official_ones() -> None:
    """Template, question and begun answer of each kind, as github.com/NVIDIA/RULER has them."""

    def whole(name: str) -> str:
        form = DEFINITIONS[name]
        return form.context + form.question + form.answer_prefix

    for name in ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2"):
        assert whole(name) == (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
            "about the number afterwards.\n{context}\nWhat is the special magic number for {query} mentioned in the "
            "provided text? The special magic number for {query} mentioned in the provided text is"
        )
    for name in ("niah_single_3", "niah_multikey_3"):
        assert whole(name) == whole("niah_single_1").replace("number", "uuid")
    for name in ("niah_multivalue", "niah_multiquery"):
        assert whole(name) == (
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
            "you about the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} "
            "mentioned in the provided text? The special magic numbers for {query} mentioned in the provided text are"
        )
    assert whole("vt").format(context="TEXT", query="12345", count=5) == (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\nTEXT\nQuestion: Find "
        "all variables that are assigned the value 12345 in the text above. Answer: According to the chain(s) of "
        "variable assignment in the text above, 5 variables are assigned the value 12345, they are: "
    )
    assert whole("cwe") == (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: "
        "The top 10 words that appear most often in the list are:"
    )
    assert whole("fwe") == (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text? Answer: According to the coded "
        "text above, the three most frequently appeared words are:"
    )
    for name in ("qa_1", "qa_2"):
        assert whole(name) == (
            "Answer the question based on the given documents. Only give me the answer and do not output any other "
            "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
            "documents. Only give me the answer and do not output any other words.\n\nQuestion: {query} Answer:"
        )
    lengths = {"niah": 128, "variables": 30, "common": 120, "frequent": 50, "qa": 32}
    assert len(DEFINITIONS) == 13
    assert all(item.max_new_tokens == lengths[item.kind] for item in DEFINITIONS.values())
    assert OFFLINE == ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


@pytest.mark.parametrize("part", DEFINITIONS)
def test_prompt_and_answer_fill_the_length(part: str, tokenizer: Any, questions: Path, essay: Path) -> None:
    found = made(part, tokenizer, questions, essay)
    form = DEFINITIONS[part]
    for document in found:
        tokens = document.request.prompt_tokens
        assert tokens == document.info["prompt_tokens"] <= 9000 - form.max_new_tokens
        assert document.request.max_new_tokens == form.max_new_tokens  # type: ignore[union-attr]
        text = text_of(tokenizer, document)
        assert document.info["task"] == part
        assert document.info["length"] == 9000
        assert text.startswith(form.context[:30])
        for reference in document.reference:
            assert reference in text or form.any_reference
        assert any(reference in text for reference in document.reference) or part == "qa_2"
    assert [document.id for document in found] == [f"9000-{n}" for n in range(len(found))]
    if form.kind != "qa":
        assert len(found) == len({text_of(tokenizer, document) for document in found}) == 6
        assert max(document.request.prompt_tokens for document in found) > (7500 if part == "fwe" else 8000)


@pytest.mark.parametrize("part", DEFINITIONS)
@pytest.mark.parametrize("chat", [False, True])
def test_the_question_begins_where_kvpress_has_it(
    part: str, chat: bool, tokenizer: Any, chat_tokenizer: Any, questions: Path, essay: Path
) -> None:
    own = chat_tokenizer if chat else tokenizer
    whole = made(part, own, questions, essay, options={"samples": 2})
    divided = made(part, own, questions, essay, options={"samples": 2}, question="after")
    begins = {
        "niah": r"What (?:is|are all) the special magic",
        "variables": r"Question: Find all variables that are assigned the value",
        "common": r"Question: What are the 10 most common words in the above list\?",
        "frequent": r"Question: Do not provide any explanation\.",
        "qa": r"Answer the question based on the given documents\.",
    }[DEFINITIONS[part].kind]
    for before, after in zip(whole, divided, strict=True):
        assert not before.request.question_ids  # type: ignore[union-attr]
        assert before.request.prompt_ids == after.request.input_ids  # type: ignore[union-attr]
        question = str(own.decode(list(after.request.question_ids)))  # type: ignore[union-attr]
        assert re.match(begins, question)
        assert len(re.findall(begins, question)) == 1
        assert ("<|end|><|assistant|>" in question) == chat
        prefix = DEFINITIONS[part].answer_prefix.partition("{")[0]
        assert (question.rpartition("<|assistant|>")[2] if chat else question).rpartition(prefix)[1] == prefix


@pytest.mark.parametrize("part", [name for name in DEFINITIONS if name.startswith("niah")])
def test_needles_are_there_and_asked_for(part: str, tokenizer: Any, questions: Path, essay: Path) -> None:
    for document in made(part, tokenizer, questions, essay):
        text = text_of(tokenizer, document)
        needles = NEEDLE.findall(text)
        asked = re.search(r"for (.+?) mentioned in the provided text\?", text)
        assert asked is not None
        keys = [key for key in re.split(r", and |, ", asked[1]) if key]
        assert document.reference == [value for key in keys for _, found, value in needles if found == key] or (
            sorted(document.reference) == sorted(value for _, found, value in needles if found in keys)
        )
        hay = {"niah_multikey_2": document.info["size"], "niah_multikey_3": document.info["size"]}.get(part, 0)
        count = {"niah_multikey_1": 4, "niah_multiquery": 4, "niah_multivalue": 4}.get(part, 1)
        assert len(needles) == hay + count
        kind = "uuids" if part in ("niah_single_3", "niah_multikey_3") else "numbers"
        assert {what for what, _, _ in needles} == {kind}
        values = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if kind == "uuids" else r"[1-9]\d{6}"
        assert all(re.fullmatch(values, value) for _, _, value in needles)
        if part == "niah_single_1":
            assert text.count(NOISE) == document.info["size"]
        if len(document.reference) == 1:
            place = text.index(f"is: {document.reference[0]}.") / len(text)
            assert abs(place - document.info["depth"]) < 0.05
        else:
            assert "depth" not in document.info


def test_a_chain_is_followed(tokenizer: Any) -> None:
    found = documents("vt", tokenizer)
    examples = set()
    for document in found:
        text = text_of(tokenizer, document)
        example, _, task = text.partition("\n\nMemorize")
        for part, letters in ((example, 3), (task, 5)):
            first = re.search(r"^VAR ([A-Z]+) = (\d{5})$", part, re.MULTILINE)
            assert first is not None
            chain = [first[1]]
            for name, before in re.findall(r"^VAR ([A-Z]+) = VAR ([A-Z]+) $", part, re.MULTILINE):
                assert before == chain[-1]
                chain.append(name)
            assert len(set(chain)) == 5
            assert all(len(name) == letters for name in chain)
            assert f"assigned the value {first[2]} in the text above" in part
            if letters == 5:
                assert document.reference == chain
                assert part.count(NOISE) == document.info["size"]
            else:
                assert part.endswith(f"they are:  {' '.join(chain)}")
                examples.add(re.sub(r"\b[A-Z]{3}\b|\d{5}", "_", part))
    assert len(examples) == 1, "the example's words are the same, its names are not"


def test_common_words_are_common(tokenizer: Any) -> None:
    for length, often, seldom in ((9000, 30, 3), (4000, 6, 1)):
        places: dict[int, set[tuple[int, ...]]] = {}
        for document in documents("cwe", tokenizer, options={"lengths": [length]}):
            listed = re.findall(r"(\d+)\. (.+?)(?= \d+\. |\n)", text_of(tokenizer, document).rpartition("Below")[2])
            assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
            counts = Counter(word for _, word in listed)
            assert {word for word, count in counts.items() if count == often} == set(document.reference)
            assert set(counts.values()) <= {often, seldom}
            assert len(counts) == document.info["size"]
            assert len(document.reference) == 10
            mine = tuple(place for place, (_, word) in enumerate(listed) if word in document.reference)
            places.setdefault(document.info["size"], set()).add(mine)
        assert all(len(same) == 1 for same in places.values()), "officially the places are the same in all prompts"
        assert len(places) < 4


def test_frequencies_follow_the_zeta_law(tokenizer: Any) -> None:
    for document in documents("fwe", tokenizer):
        text = text_of(tokenizer, document)
        coded = text.partition("coded words. ")[2].partition("\nQuestion:")[0].split(" ")
        counts = Counter(coded).most_common()
        size = document.info["size"]
        assert [count for _, count in counts[:4]] == [int(size * k**-2 / 1.6449340668482264) for k in (1, 2, 3, 4)]
        assert counts[0][0] == "..."
        assert [word for word, _ in counts[1:4]] == document.reference
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])


def test_documents_surround_what_the_answer_stands_in(tokenizer: Any, questions: Path) -> None:
    for part, count, lengths in (("qa_1", 12, 1200), ("qa_2", 4, 1500)):
        found = documents(part, tokenizer, data_dir=questions, options={"lengths": [lengths], "samples": 50})
        assert len(found) == count, "as many as there are questions"
        for document in found:
            text = text_of(tokenizer, document)
            numbers = [int(number) for number in re.findall(r"^Document (\d+):$", text, re.MULTILINE)]
            assert numbers == list(range(1, len(numbers) + 1))
            assert document.reference[0] in text
            assert ("depth" in document.info) == (part == "qa_1")
        if part == "qa_1":
            assert all(document.reference[1] == document.reference[0].replace("shade-", "SHADE ") for document in found)
            assert all(f"house {n % 6} of article {n // 6}?" in text_of(tokenizer, d) for n, d in enumerate(found))
            sizes = {document.info["size"] for document in found}
            places = Counter(round(document.info["depth"], 2) for document in found)
            assert len(places) == len(sizes) <= 2, "officially it has one place in prompts of equally many documents"
