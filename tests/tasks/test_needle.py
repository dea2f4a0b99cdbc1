from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.base import Generated, TaskError, TaskSettings
from tasks.needle import NeedleTask

ANSWER = "The special magic number mentioned in the text is"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Counting:
    """A tokenizer that counts how often it is asked to encode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        self.encoded += 1
        return self._tokenizer.encode(*args, **kwargs)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, with a BOS token that encoding adds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {character: i + 2 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(TEMPLATE)


def ask(tokenizer: Any, **arguments: Any) -> TaskSettings:
    options = {"lengths": [1500], "samples": 4, **arguments.pop("options", {})}
    return TaskSettings(tokenizer=tokenizer, options=options, **{"max_length": 100_000, **arguments})


def test_documents_hold_the_needle_where_they_say(tokenizer: Any) -> None:
    documents = NeedleTask().load(ask(tokenizer))
    assert [d.id for d in documents] == ["1500-d0.12-0", "1500-d0.38-1", "1500-d0.62-2", "1500-d0.88-3"]
    for document in documents:
        ids = list(document.request.prompt_ids)
        text = tokenizer.decode(ids)
        assert 1500 - 40 < len(ids) <= 1500
        assert text.count(document.reference) == 1
        assert re.fullmatch(r"[1-9]\d{6}", document.reference)
        assert text.endswith(f"<|assistant|>{ANSWER}")
        place = document.info["needle_token"]
        assert tokenizer.decode(ids[place:]).lstrip().startswith(f"{ANSWER} {document.reference}. Remember it.")
        assert abs(place / len(ids) - document.info["depth"]) < 0.2
        assert document.info["length"] == 1500
        assert document.info["prompt_tokens"] == len(ids)
        assert not document.truncated
    assert len({d.reference for d in documents}) == 4
    assert len({tokenizer.decode(d.request.prompt_ids)[200:260] for d in documents}) == 4
    assert all(a.info["needle_token"] < b.info["needle_token"] for a, b in pairwise(documents))


def test_seed_decides() -> None:
    tokenizer = byte_tokenizer(TEMPLATE)
    first = NeedleTask().load(ask(tokenizer, seed=3))
    assert first == NeedleTask().load(ask(tokenizer, seed=3))
    assert [d.reference for d in first] != [d.reference for d in NeedleTask().load(ask(tokenizer, seed=4))]


@settings(deadline=None, max_examples=20)
@given(length=st.integers(400, 4000), seed=st.integers(0, 999), chat=st.booleans())
def test_prompts_fill_the_length_and_never_exceed_it(length: int, seed: int, chat: bool) -> None:
    tokenizer = byte_tokenizer(TEMPLATE if chat else None)
    documents = NeedleTask().load(ask(tokenizer, seed=seed, options={"lengths": [length], "samples": 2}))
    for document in documents:
        assert length - 40 < len(document.request.prompt_ids) <= length
        assert document.reference in tokenizer.decode(document.request.prompt_ids)


def test_sentences_do_not_repeat(tokenizer: Any) -> None:
    (document,) = NeedleTask().load(ask(tokenizer, options={"lengths": [30_000], "samples": 1}))
    sentences = re.findall(r"[A-Z][^.?]+\.", tokenizer.decode(document.request.prompt_ids))
    assert len(sentences) > 300
    assert len(set(sentences)) == len(sentences)


def test_building_takes_a_few_tokenizations(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    NeedleTask().load(ask(counting, options={"lengths": [50_000], "samples": 4}))
    assert counting.encoded / 4 < 8


def test_without_a_chat_template_special_tokens_are_the_tokenizers() -> None:
    plain, chat = byte_tokenizer(), byte_tokenizer(TEMPLATE)
    seen = []

    class Spy(Counting):
        def encode(self, text: str, **kwargs: Any) -> list[int]:
            seen.append(kwargs["add_special_tokens"])
            return super().encode(text, **kwargs)

    (document, *_) = NeedleTask().load(ask(Spy(plain)))
    assert plain.decode(document.request.prompt_ids).endswith(f"?\n{ANSWER}")
    assert set(seen) == {True}
    seen.clear()
    NeedleTask().load(ask(Spy(chat)))
    assert set(seen) == {False}


@pytest.mark.parametrize(
    "text, expected",
    [
        (" 4823917. Remember it.", 1.0),
        (" **4823917**", 1.0),
        (" 4,823,917.", 1.0),
        ("4823917", 1.0),
        (" 4823918, no, 4823917", 0.0),
        (" 48239170", 0.0),
        (" 482391", 0.0),
        (" 4823 917", 0.0),
        ("", 0.0),
        (" forty-two", 0.0),
    ],
)
def test_score_reads_the_first_number(tokenizer: Any, text: str, expected: float) -> None:
    (document, *_) = NeedleTask().load(ask(tokenizer))
    document = replace(document, reference="4823917")
    assert NeedleTask().score(document, Generated(text=text)) == {"exact_match": expected}


def test_evaluate_averages(tokenizer: Any) -> None:
    task = NeedleTask()
    documents = task.load(ask(tokenizer))
    answers = {d.id: Generated(text=d.reference if i else "0") for i, d in enumerate(documents)}
    assert task.evaluate(documents, answers).values == {"exact_match": 0.75}
    assert task.data_hash() == ""


def test_limit_is_spread_and_keeps_the_same_documents(tokenizer: Any) -> None:
    options = {"lengths": [900, 1200], "samples": 8}
    everything = {d.id: d for d in NeedleTask().load(ask(tokenizer, options=options))}
    assert len(everything) == 16
    for limit in (1, 2, 5, 15, 99):
        some = NeedleTask().load(ask(tokenizer, options=options, limit=limit))
        assert len(some) == min(limit, 16)
        assert all(everything[d.id] == d for d in some)
        per_length = [sum(d.info["length"] == length for d in some) for length in options["lengths"]]
        assert max(per_length) - min(per_length) <= 1
    few = NeedleTask().load(ask(tokenizer, options=options, limit=4))
    assert [d.info["depth"] for d in few] == [0.3125, 0.8125] * 2


def test_sampling_ratio_draws_from_every_length(tokenizer: Any) -> None:
    options = {"lengths": [900, 1200], "samples": 8}
    everything = {d.id: d for d in NeedleTask().load(ask(tokenizer, options=options))}
    half = NeedleTask().load(ask(tokenizer, options=options, sampling_ratio=0.5))
    assert [d.info["length"] for d in half] == [900] * 4 + [1200] * 4
    assert all(everything[d.id] == d for d in half)
    assert half == NeedleTask().load(ask(tokenizer, options=options, sampling_ratio=0.5))
    other = NeedleTask().load(ask(tokenizer, options=options, sampling_ratio=0.5, seed=1))
    assert [d.id for d in half] != [d.id for d in other]


def test_none_is_the_default(tokenizer: Any) -> None:
    assert set(NeedleTask.option_names) == {"lengths", "samples", "digits", "haystack"}
    documents = NeedleTask().load(ask(tokenizer, options={"lengths": 700, "samples": None, "haystack": None}))
    assert len(documents) == 8
    assert {d.info["length"] for d in documents} == {700}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": [900]}, "no option 'length': did you mean lengths"),
        ({"lengths": []}, "lengths must be whole numbers"),
        ({"lengths": [0]}, "lengths must be whole numbers"),
        ({"lengths": "1500"}, "lengths must be whole numbers"),
        ({"lengths": [900, 900]}, "twice"),
        ({"samples": 0}, "samples must be a whole number of at least 1, not 0"),
        ({"digits": 2.5}, "digits must be a whole number of at least 1, not 2.5"),
        ({"lengths": [100]}, "100 tokens are too short: the question alone takes"),
        ({"lengths": [1500, 99_990]}, r"99990 tokens .* maximum of 100000"),
    ],
)
def test_bad_options(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        NeedleTask().load(ask(tokenizer, options=options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampling_ratio, limit", [(0.0, None), (1.5, None), (1.0, 0)])
def test_bad_settings(sampling_ratio: float, limit: int | None) -> None:
    with pytest.raises(TaskError):
        TaskSettings(tokenizer=None, max_length=10, sampling_ratio=sampling_ratio, limit=limit)


# --- A haystack of one's own ---


def write(folder: Path, content: bytes) -> Path:
    (folder / "haystack.txt").write_bytes(content)
    return folder / "haystack.txt"


@pytest.mark.parametrize(
    "content",
    [
        b"It was a day like any other. Nobody knew what to say! Was it right?\n\n" * 40,
        ("one endless sentence without a stop " * 80).encode(),
        "夏天的早晨，孩子们在河边唱歌。老人坐在树下看书。".encode() * 60,
        "没有空格也没有句号的长文".encode() * 120,
    ],
    ids=["sentences", "one sentence", "chinese", "chinese without stops"],
)
def test_own_haystack(tokenizer: Any, tmp_path: Path, content: bytes) -> None:
    task = NeedleTask()
    path = write(tmp_path, content)
    documents = task.load(ask(tokenizer, options={"haystack": path}))
    assert len(task.data_hash()) == 64
    for document in documents:
        assert 1500 - 40 < len(document.request.prompt_ids) <= 1500
        assert document.reference in tokenizer.decode(document.request.prompt_ids)
    task.load(ask(tokenizer))
    assert task.data_hash() == ""


@pytest.mark.parametrize(
    "content, message",
    [(b"", "is empty"), (b" \n\n ", "is empty"), (b"Too short. " * 5, "too short"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_bad_haystack(tokenizer: Any, tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        NeedleTask().load(ask(tokenizer, options={"haystack": write(tmp_path, content)}))


def test_missing_haystack(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"cannot read the text .*nothing\.txt: No such file"):
        NeedleTask().load(ask(tokenizer, options={"haystack": str(tmp_path / "nothing.txt")}))


@pytest.mark.slow
def test_the_default_model_finds_every_needle() -> None:
    import torch

    from bench.models.loading import load

    loaded = load("smollm2-135m")
    task = NeedleTask()
    documents = task.load(TaskSettings(tokenizer=loaded.tokenizer, max_length=8192, seed=11))
    answers = {}
    for document in documents:
        ids = torch.tensor([document.request.prompt_ids])
        output = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=document.request.max_new_tokens,
            do_sample=False,
        )
        answers[document.id] = Generated(text=loaded.tokenizer.decode(output[0, ids.shape[1] :]))
    assert task.evaluate(documents, answers).values == {"exact_match": 1.0}


@pytest.mark.parametrize("chat", [None, TEMPLATE])
def test_in_parts_it_is_the_same_tokens(chat: str | None) -> None:
    """The haystack with its needle is the context; the question, and the begun answer, come behind it."""
    own = byte_tokenizer(chat)
    before, after = (NeedleTask().load(ask(own, question=place)) for place in ("before", "after"))
    for whole, parts in zip(before, after, strict=True):
        assert whole.request.question_ids == ()
        assert parts.request.input_ids == whole.request.prompt_ids
        assert replace(parts, request=whole.request) == whole
        asked = own.decode(parts.request.question_ids)
        assert asked.startswith("\n\nWhat is the special magic number mentioned in the text?")
        assert asked.endswith(ANSWER)
        assert whole.reference in own.decode(parts.request.prompt_ids)
