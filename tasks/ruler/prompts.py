"""From texts to tokens: the chat template, where there is one, and the boundary between context and question."""

from __future__ import annotations

from typing import Any

from tasks import parts
from tasks.base import Generate, Place
from tasks.ruler.makers import Text


class Prompts:
    """What a tokenizer makes of texts. Its chat template is put around context and question; the begun answer stands
    behind it, as officially.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._chat = bool(getattr(tokenizer, "chat_template", None))

    def _render(self, message: str) -> str:
        if not self._chat:
            return message
        # Templates of hybrid reasoning models open a thought unless told not to; the others ignore the switch.
        shown: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return shown

    def _encode(self, text: str) -> list[int]:
        # A chat template has written the special tokens already.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not self._chat, verbose=False)
        return ids

    def tokens(self, text: Text) -> int:
        """Tokens of the whole prompt."""
        return len(self._encode(self._render(text.context + text.question) + text.answer_prefix))

    def plain_tokens(self, text: str) -> int:
        """Tokens of a text without template and special tokens."""
        return len(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def request(self, text: Text, max_new_tokens: int, place: Place) -> Generate:
        """The question, with the begun answer, behind the context or in one prompt with it.

        Raises:
            TaskError: the chat template does not keep context and question apart.
        """
        if place == "before":
            whole = self._encode(self._render(text.context + text.question) + text.answer_prefix)
            return Generate(prompt_ids=tuple(whole), max_new_tokens=max_new_tokens)
        shown, boundary = parts.rendered(self._render, text.context, text.question)
        found = parts.split(self._tokenizer, shown + text.answer_prefix, boundary, add_special_tokens=not self._chat)
        return Generate(prompt_ids=found.context_ids, question_ids=found.question_ids, max_new_tokens=max_new_tokens)
