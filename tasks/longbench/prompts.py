"""LongBench's prompts: the official templates, the cut in the middle, the chat template.

The templates are those of the installed lm-eval package, whose task files are read as text. They call LongBench's
``input`` a ``question``, and white space got lost in six of them, which is put back.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.base import TaskError, TaskSettings
from tasks.longbench.datasets import Dataset
from tasks.longbench.options import LongBenchOptions
from tasks.parts import Parts, rendered, split

LLAMA_LENGTH = 31_500
"""Prompts of Llama models are cut to so many tokens, as published; those of the others to the model's context."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a dataset asks."""

    text: str
    """With ``{context}`` and ``{input}``, the names of a row's fields."""
    max_new_tokens: int

    def fill(self, context: str, input: str) -> tuple[str, int]:
        """The prompt of a row, and the character that its question begins at: what follows the context.

        The instruction before the context belongs to it, as it does where a dataset's question is nothing but the
        repeated instruction. No template has ``{input}`` before ``{context}``.
        """
        before, _, after = self.text.partition("{context}")
        begin = before + context
        return begin + after.replace("{input}", input), len(begin)


class _TaskFileLoader(yaml.SafeLoader):
    """Reads lm-eval's task files without running what their tags name."""


_TaskFileLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


@functools.cache
def template(name: str) -> Template:
    """The official template of a dataset. Raises :class:`TaskError` where lm-eval does not have it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise TaskError("longbench reads its prompts from lm-eval, which is not installed: pip install lm-eval")
    path = Path(spec.origin).parent / "tasks" / "longbench" / f"{name}.yaml"
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _TaskFileLoader)
        text, max_new_tokens = config["doc_to_text"], config["generation_kwargs"]["max_gen_toks"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise TaskError(
            f"longbench: the installed lm-eval has no prompt for {name} in {path} ({type(error).__name__}): "
            "install the version that constraints.txt names"
        ) from error
    text = text.replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    if "{context}" not in text:
        raise TaskError(
            f"longbench: the prompt for {name} in {path} has no {{context}} to compress: install the version "
            "of lm-eval that constraints.txt names"
        )
    return Template(text=_with_white_space(name, text), max_new_tokens=max_new_tokens)


def _with_white_space(name: str, text: str) -> str:
    if name in ("triviaqa", "samsum"):
        return re.sub(r"\{context\}\n+\{input\}", "{context}\n\n{input}", text)
    if name in ("passage_count", "passage_retrieval_en"):
        return text.rstrip() + " "
    if name in ("lcc", "repobench-p"):
        return text.rstrip() + "\n"
    return text


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model gets it."""

    ids: tuple[int, ...]
    """Those of the context alone, where the prompt is divided."""
    question_ids: tuple[int, ...]
    cut_tokens: int
    """Tokens that were left out of the middle; 0 for a prompt that fits."""


def build_prompt(
    dataset: Dataset, text: str, settings: TaskSettings, *, max_new_tokens: int, boundary: int | None = None
) -> Prompt:
    """Cut ``text`` in the middle, apply the chat template where the dataset wants one, and tokenize.

    The cut is the official one: to the model's ``max_length`` before the chat template, whose tokens and the answer's
    come on top. Only where the context has no room for them is the prompt cut shorter.

    Args:
        boundary: the question begins at this character of ``text``; it is divided there, into the same tokens. None
            leaves it whole.

    Raises:
        TaskError: the context has no room for the answer, or the text cannot be divided.
    """
    tokenizer = settings.tokenizer
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    limit = _limit(settings)
    while True:
        shown = text if len(ids) <= limit else _middle_cut(tokenizer, ids, limit)
        final = _encode(tokenizer, shown, chat=dataset.uses_chat_template)
        excess = 0 if settings.context_length is None else len(final) + max_new_tokens - settings.context_length
        if excess <= 0:
            cut_tokens = 0 if shown is text else len(ids) - 2 * (limit // 2)
            if boundary is None:
                return Prompt(ids=tuple(final), question_ids=(), cut_tokens=cut_tokens)
            if cut_tokens:
                boundary = len(shown) - _shown_of_question(tokenizer, text, boundary, shown, limit // 2)
            parts = _divided(tokenizer, shown, boundary, chat=dataset.uses_chat_template)
            return Prompt(ids=parts.context_ids, question_ids=parts.question_ids, cut_tokens=cut_tokens)
        limit = min(limit, len(ids)) - excess
        if limit < 2:
            raise TaskError(
                f"longbench: an answer of {max_new_tokens} tokens to {dataset.name} leaves no room for a prompt in the "
                f"model's context of {settings.context_length}"
            )


def _limit(settings: TaskSettings) -> int:
    given = LongBenchOptions.parse("longbench", settings.options).max_length
    if given is not None:
        return given
    return min(LLAMA_LENGTH, settings.max_length) if settings.model_type == "llama" else settings.max_length


def _middle_cut(tokenizer: Any, ids: list[int], limit: int) -> str:
    """Half of ``limit`` from each end, as text; an odd limit loses one more. The halves meet without a mark."""
    half = limit // 2
    ends = (ids[:half], ids[-half:])
    return "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends)


def _shown_of_question(tokenizer: Any, text: str, boundary: int, shown: str, half: int) -> int:
    """Characters of the question that a cut has left at the end of ``shown``. Raises :class:`TaskError`."""
    parts = split(tokenizer, text, boundary)
    left = tokenizer.decode(parts.question_ids[-half:], skip_special_tokens=True)
    if not shown.endswith(left):
        raise TaskError("longbench: the cut text does not end with its question: --question before asks it whole")
    return len(left)


def _divided(tokenizer: Any, text: str, boundary: int, *, chat: bool) -> Parts:
    """The tokens of :func:`_encode`, divided where the question begins at character ``boundary``."""
    chat = chat and bool(getattr(tokenizer, "chat_template", None))
    if chat:
        text, boundary = rendered(functools.partial(_in_chat, tokenizer), text[:boundary], text[boundary:])
    return split(tokenizer, text, boundary, add_special_tokens=not chat)


def _in_chat(tokenizer: Any, text: str) -> str:
    # Templates of hybrid reasoning models open a thought unless told not to; the others ignore the switch.
    message: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return message


def _encode(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    chat = chat and bool(getattr(tokenizer, "chat_template", None))
    if chat:
        text = _in_chat(tokenizer, text)
    # A chat template has written the special tokens already.
    ids: list[int] = tokenizer(text, truncation=False, add_special_tokens=not chat, verbose=False).input_ids
    return ids
