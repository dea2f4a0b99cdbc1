"""A prompt and its parts: the tokens are those of the whole text, divided where the question begins."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks.base import TaskError
from tasks.parts import Parts, asked, rendered, split


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens reach over any boundary: it merges across spaces and line ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the end. What is it?", "the end.\n\nWhat é is it? 你好吗"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


FAST = merging()


class Slow:
    """The same without offsets."""

    is_fast = False

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return FAST(text, **options)


TEXTS = st.text(alphabet="the nd.Wais?\né你好", min_size=1, max_size=12)


@given(TEXTS, TEXTS)
def test_the_tokens_are_those_of_the_whole_text(context: str, question: str) -> None:
    text = context + question
    whole = tuple(FAST(text).input_ids)
    for tokenizer in (FAST, Slow()):
        try:
            parts = split(tokenizer, text, len(context))
        except TaskError:
            # One token over both parts.
            continue
        assert parts.context_ids + parts.question_ids == whole
        # No token of the context knows a character of the question.
        assert FAST.decode(parts.context_ids).rstrip("\ufffd") in context
        assert len(FAST.decode(parts.question_ids).lstrip("\ufffd")) >= len(question) - 1


def test_a_question_is_asked_behind_the_context_or_in_the_prompt() -> None:
    parts = Parts((1, 2), (3,))
    behind = asked(parts, "after", max_new_tokens=4, stop=("x",))
    assert (behind.prompt_ids, behind.question_ids) == ((1, 2), (3,))
    whole = asked(parts, "before", max_new_tokens=4, stop=("x",))
    assert (whole.prompt_ids, whole.question_ids) == ((1, 2, 3), ())
    assert behind.input_ids == whole.input_ids
    assert (behind.max_new_tokens, behind.stop) == (whole.max_new_tokens, whole.stop) == (4, ("x",))


def test_a_token_that_reaches_into_the_question_belongs_to_it() -> None:
    text = "xx the end. What is it?"
    spans = FAST(text, return_offsets_mapping=True).offset_mapping
    place = next(place for place, (begin, end) in enumerate(spans) if place and end - begin > 1)
    boundary = spans[place][0] + 1
    assert len(split(FAST, text, boundary).context_ids) == place
    assert 0 < len(split(Slow(), text, boundary).context_ids) <= place


@pytest.mark.parametrize(("boundary", "lacks"), [(0, "context"), (8, "question")])
def test_a_part_without_tokens_is_refused(boundary: int, lacks: str) -> None:
    with pytest.raises(TaskError, match=f"without a {lacks} cannot be divided: --question before"):
        split(FAST, "the end.", boundary)


def test_a_chat_template_writes_around_both_parts() -> None:
    assert rendered(lambda text: f"<u>{text.strip()}</u>", " the end.", "What?") == ("<u>the end.What?</u>", 11)


def test_a_template_that_changes_what_is_between_them_is_refused() -> None:
    with pytest.raises(TaskError, match="changes the text between context and question"):
        rendered(lambda text: f"{len(text)}: {text}", "the end.", "What?")
