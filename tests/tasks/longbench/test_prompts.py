"""LongBench's prompts: the official templates, the cut in the middle, and who gets a chat template."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tasks.base import TaskError, TaskSettings
from tasks.longbench import prompts
from tasks.longbench.datasets import DATASETS
from tasks.longbench.prompts import build_prompt, template

CHAT = "{{ bos_token }}<user>{{ messages[0]['content'] }}<assistant>"


def characters(chat_template: str | None = None) -> Any:
    """A token for each byte, and a BOS token in front, as Llama's tokenizer has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<user>", "<assistant>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=chat_template,
    )


def settings(tokenizer: Any, *, context: int | None = 1_000, given: int | None = None, model_type: str = "") -> Any:
    longest = min(length for length in (context, given) if length is not None)
    return TaskSettings(
        tokenizer=tokenizer,
        max_length=longest,
        context_length=context,
        model_type=model_type,
        options={} if given is None else {"max_length": given},
    )


def shown(name: str, text: str, made: TaskSettings, *, answer: int = 10) -> tuple[str, int]:
    """The prompt as text with its special tokens, and the tokens cut out."""
    prompt = build_prompt(DATASETS[name], text, made, max_new_tokens=answer)
    return made.tokenizer.decode(prompt.ids), prompt.cut_tokens


def test_templates_and_lengths_are_the_official_ones(shared_data: Path) -> None:
    with open(shared_data / "longbench_templates.csv", encoding="utf-8", newline="") as file:
        official = {row["dataset"]: row for row in csv.DictReader(file)}
    assert set(official) == set(DATASETS)
    for name, row in official.items():
        found = template(name)
        assert hashlib.sha256(found.text.encode()).hexdigest() == row["template_sha256"], name
        assert found.max_new_tokens == int(row["max_new_tokens"]), name


def test_white_space_is_put_right_once() -> None:
    for name, text in (("samsum", "a\n\n{context}\n\n{input}"), ("passage_count", "is: "), ("lcc", "code:\n")):
        assert prompts._with_white_space(name, text) == text
    assert prompts._with_white_space("triviaqa", "{context}\n{input}") == "{context}\n\n{input}"
    assert prompts._with_white_space("qasper", "{context}\n{input}") == "{context}\n{input}"


def test_an_lm_eval_without_the_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    with pytest.raises(TaskError, match=r"no prompt for trec in .*trec\.yaml"):
        template.__wrapped__("trec")
    path = tmp_path / "tasks" / "longbench" / "trec.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("doc_to_text: 'What is {{question}}?'\ngeneration_kwargs: {max_gen_toks: 64}\n")
    with pytest.raises(TaskError, match=r"the prompt for trec in .*trec\.yaml has no {context} to compress"):
        template.__wrapped__("trec")


def test_half_from_each_end_counts_the_special_token_and_drops_it() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(100))
    made = settings(characters(), given=20)
    # 101 tokens with BOS: BOS and 9 letters, then 10 letters.
    assert shown("trec", text, made) == ("<bos>" + text[:9] + text[-10:], 81)
    assert shown("trec", text, settings(characters(), given=21)) == ("<bos>" + text[:9] + text[-10:], 81)
    assert shown("trec", text, settings(characters(), given=101)) == ("<bos>" + text, 0)
    assert shown("trec", text, settings(characters(), given=100)) == ("<bos>" + text[:49] + text[-50:], 1)


def test_a_cut_through_a_character_is_no_error() -> None:
    text = "é" * 50
    prompt, _ = shown("trec", text, settings(characters(), given=20))
    assert prompt == "<bos>" + "é" * 4 + "\ufffd" + "é" * 5


@pytest.mark.parametrize("name", DATASETS)
def test_six_datasets_get_no_chat_template(name: str) -> None:
    plain = name in {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    expected = "<bos>text" if plain else "<bos><user>text<assistant>"
    assert shown(name, "text", settings(characters(CHAT))) == (expected, 0)
    assert shown(name, "text", settings(characters())) == ("<bos>text", 0)


def test_the_chat_template_comes_on_top_of_the_cut() -> None:
    text = "x" * 100
    found, cut = shown("qasper", text, settings(characters(CHAT), given=20))
    assert (found, cut) == ("<bos><user>" + "x" * 19 + "<assistant>", 81)


def test_without_room_for_the_answer_the_cut_is_shorter() -> None:
    made = settings(characters(CHAT), context=100)
    prompt = build_prompt(DATASETS["qasper"], "x" * 500, made, max_new_tokens=30)
    assert 66 <= len(prompt.ids) <= 70
    # A prompt that fits by itself, but not with template and answer.
    prompt = build_prompt(DATASETS["qasper"], "x" * 80, made, max_new_tokens=30)
    assert 66 <= len(prompt.ids) <= 70
    assert prompt.cut_tokens > 0
    with pytest.raises(TaskError, match="leaves no room for a prompt in the model's context of 100"):
        build_prompt(DATASETS["qasper"], "x" * 80, made, max_new_tokens=97)


def test_default_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LLAMA_LENGTH", 40)
    text = "x" * 500

    def length(**given: Any) -> int:
        return len(build_prompt(DATASETS["trec"], text, settings(characters(), **given), max_new_tokens=10).ids)

    assert length(model_type="llama") == 40
    assert length(model_type="llama", given=60) == 60
    assert length(model_type="qwen3", context=300) in (289, 290)
    assert length(model_type="llama", context=30) in (19, 20)
    assert length(context=None, given=50) == 50


def test_braces_in_a_text_are_text() -> None:
    assert "x = '{input}'" in template("lcc").text.format(context="x = '{input}'", input="")
